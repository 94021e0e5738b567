"""Calls of native libraries that may print to stderr, panic, or never end."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

T = TypeVar("T")

_lock = threading.Lock()
_silencing = 0
_stderr: int | None = None
_written: int | None = None
_drop = False


class NativeError(Exception):
    """A native library raised, panicked or did not end; the text says which, in one line."""


def call_native(function: Callable[[], T], seconds: float) -> T:
    """Call a function in a thread of its own; its errors write nothing to stderr.

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
            raise NativeError(one_line(errors[0])) from errors[0]
        raise NativeError(f"it did not end within {seconds:g} s")


def one_line(error: BaseException) -> str:
    """Text of an error in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]


@contextmanager
def silenced_stderr(*, always: bool = False) -> Iterator[None]:
    """Hold back what anybody writes to the process's stderr, file descriptor 2, in the block.

    Where the block raises, it is dropped. Otherwise it is written afterwards, since it may be the
    bars of other threads, unless ``always`` drops it too.
    """
    global _silencing, _stderr, _written, _drop
    if sys.__stderr__ is None:  # closed from the beginning, so 2 may be any file
        yield
        return
    with _lock:
        if _silencing == 0:
            _stderr, _drop, _written = os.dup(2), False, _open_buffer()
            os.dup2(_written, 2)
        _silencing += 1
    failed = True
    try:
        yield
        failed = always
    finally:
        with _lock:
            _drop |= failed
            _silencing -= 1
            if _silencing == 0 and _stderr is not None and _written is not None:
                os.dup2(_stderr, 2)
                if not _drop:
                    os.lseek(_written, 0, os.SEEK_SET)
                    while data := os.read(_written, 1 << 16):
                        with suppress(OSError):  # a closed or full stderr costs nothing else
                            os.write(_stderr, data)
                os.close(_stderr)
                os.close(_written)
                _stderr = _written = None


def _open_buffer() -> int:
    """Open a file in memory, or a temporary one where there is no such thing."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("stderr")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
