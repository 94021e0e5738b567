"""Ctrl-C for commands that run Python inside C++, as tracing and building do.

There KeyboardInterrupt may be raised where C++ lets nothing pass, and the process aborts. So the
handler of the signal itself undoes what was begun, and ends the process.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

INTERRUPTED = "interrupted: nothing partial was left behind"
EXIT_CODE = 130

_cleanups: list[Callable[[], object]] = []


@contextmanager
def cleanup_on_sigint(cleanup: Callable[[], object]) -> Iterator[None]:
    """Have ``cleanup`` called if Ctrl-C ends the process inside the block."""
    _cleanups.append(cleanup)
    try:
        yield
    finally:
        _cleanups.remove(cleanup)


@contextmanager
def exit_on_sigint() -> Iterator[None]:
    """Let Ctrl-C end the process with exit code 130 from anywhere inside the block.

    Nothing is raised, so only what :func:`cleanup_on_sigint` names is undone, the latest first.
    """
    before = signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for cleanup in reversed(_cleanups):
        with suppress(Exception):
            cleanup()
    with suppress(OSError):
        sys.stdout.flush()
        os.write(sys.stderr.fileno(), f"{INTERRUPTED}\n".encode())
    os._exit(EXIT_CODE)
