"""Locks on hidden files, which the system frees when their process dies, however it dies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from wanx.interruption import cleanup_on_sigint


@contextmanager
def locked_file(path: Path, timeout: float = 0) -> Iterator[None]:
    """Hold the lock of a file that is created for it and removed after it.

    Args:
        path: of the file.
        timeout: seconds to wait for the lock.

    Raises:
        filelock.Timeout: another process, or another user of the lock in this one, holds it.
        OSError: the file cannot be created.
    """
    lock = FileLock(path, timeout=timeout)
    lock.acquire()
    try:
        with cleanup_on_sigint(path.unlink):
            yield
    finally:
        with suppress(OSError):  # safe while held: filelock never grants a lock on an unlinked file
            path.unlink()
        lock.release()
