"""Processes that hold something until they are ended."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.paths import ROOT


@contextmanager
def running(code: str, path: Path, *, says: str) -> Iterator[subprocess.Popen[str]]:
    """Run Python code on a path, wait for its first line, and kill it after the block.

    Args:
        code: prints ``says``, and does not end by itself.
        path: its argument.
        says: the line that shows that it has what it holds.
    """
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"{says}\n"
            yield process
        finally:
            process.kill()
