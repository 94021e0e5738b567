"""The tools of the tiny model are scripts beside each other, so tests import them from there."""

import sys
from pathlib import Path

TOOLS = Path(__file__).parents[2] / "tools"
sys.path[:0] = [str(TOOLS), str(TOOLS / "tiny")]
