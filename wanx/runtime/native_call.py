"""Calls of native libraries that may print to stderr, panic, or never end."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

_lock = threading.Lock()
_silencing = 0
_stderr: int | None = None


class NativeError(Exception):
    """A native library raised, panicked or did not end; the text says which, in one line."""


def call_native(function: Callable[[], T], seconds: float) -> T:
    """Call a function in a thread of its own; what it writes to the process's stderr is dropped.

    Args:
        function: releases Python's lock while it is busy; where it does not end, its thread stays
            behind until the process ends.
        seconds: to wait.

    Raises:
        NativeError: it raised anything, a panic of Rust included, or did not end in time.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:  # a panic of Rust is no Exception
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    with silenced_stderr():
        thread.start()
        thread.join(seconds)
    if results:
        return results[0]
    if errors:
        raise NativeError(" ".join(str(errors[0]).split())[:200]) from errors[0]
    raise NativeError(f"it did not end within {seconds:g} s")


@contextmanager
def silenced_stderr() -> Iterator[None]:
    """Drop what anybody writes to the process's stderr, file descriptor 2, in the block."""
    global _silencing, _stderr
    if sys.__stderr__ is None:  # closed from the beginning, so 2 may be any file
        yield
        return
    with _lock:
        if _silencing == 0:
            _stderr = os.dup(2)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 2)
            os.close(null)
        _silencing += 1
    try:
        yield
    finally:
        with _lock:
            _silencing -= 1
            if _silencing == 0 and _stderr is not None:
                os.dup2(_stderr, 2)
                os.close(_stderr)
                _stderr = None
