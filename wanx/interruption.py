"""Ctrl-C, and the other signals that end a process, which undo what was begun as Ctrl-C does.

Where Python runs inside C++, as in tracing and building, KeyboardInterrupt may be raised where C++
lets nothing pass, and the process aborts. So there the handler of the signal itself undoes what was
begun, and ends the process.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TypeVar

INTERRUPTED = "interrupted: nothing partial was left behind"

# From a shell, a closed terminal, a service manager or a batch system; not all systems have all.
_NAMES = ("SIGTERM", "SIGHUP", "SIGQUIT", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGXCPU")
_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))

_POLL = 0.2  # seconds
T = TypeVar("T")
_cleanups: list[Callable[[], object]] = []
_received: int = signal.SIGINT


def exit_code() -> int:
    """Return 128 + the number of the signal that interrupted the process, as shells do."""
    return 128 + _received


@contextmanager
def interrupt_on_signals() -> Iterator[None]:
    """Let SIGTERM, SIGHUP and the like raise KeyboardInterrupt inside the block, as Ctrl-C does.

    A signal that is ignored, as SIGHUP is under nohup, stays ignored. After the first one the
    others are ignored too, so that none interrupts the clean-up.
    """
    global _received
    _received = signal.SIGINT
    with _handled([n for n in _SIGNALS if signal.getsignal(n) == signal.SIG_DFL], _interrupt):
        yield


@contextmanager
def cleanup_on_sigint(cleanup: Callable[[], object]) -> Iterator[None]:
    """Have ``cleanup`` called if a signal ends the process inside the block."""
    _cleanups.append(cleanup)
    try:
        yield
    finally:
        _cleanups.remove(cleanup)


@contextmanager
def exit_on_sigint() -> Iterator[None]:
    """Let Ctrl-C and the like end the process with 128 + the signal from anywhere in the block.

    Nothing is raised, so only what :func:`cleanup_on_sigint` names is undone, the latest first.
    """
    ignored = [number for number in _SIGNALS if signal.getsignal(number) == signal.SIG_IGN]
    with _handled([signal.SIGINT, *(n for n in _SIGNALS if n not in ignored)], _end):
        yield


def result_of(future: Future[T]) -> T:
    """Result of a future, in a wait that a signal ends.

    Python runs handlers between two steps of its own. A signal that arrives just before a wait
    without a limit would be handled after it.
    """
    while not wait([future], _POLL).done:
        pass
    return future.result()


@contextmanager
def _handled(
    numbers: list[signal.Signals], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _received
    _received = number
    for other in _SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt


def _end(number: int, frame: FrameType | None) -> None:
    for other in (signal.SIGINT, *_SIGNALS):
        signal.signal(other, signal.SIG_IGN)
    for cleanup in reversed(_cleanups):
        with suppress(Exception):
            cleanup()
    with suppress(OSError):
        sys.stdout.flush()
        os.write(sys.stderr.fileno(), f"{INTERRUPTED}\n".encode())
    os._exit(128 + number)
