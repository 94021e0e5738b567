"""The tools of the tiny model are scripts beside each other, so tests import them from there."""

import sys

from tests.support.paths import TOOLS

sys.path[:0] = [str(TOOLS), str(TOOLS / "tiny")]
