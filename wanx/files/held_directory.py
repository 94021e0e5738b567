"""Directories that a process reads, so that no other process deletes their files meanwhile.

A reader holds a shared lock on the open directory (``flock``), and reads through ``/proc/self/fd``:
the directory stays the same one whatever its name comes to mean. Who deletes needs the lock for
itself. The system frees a lock when its process dies. Where there are no such locks or no
``/proc``, a directory is read by its name, and deleted whoever reads it.
"""

from __future__ import annotations

import os
import shutil
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_DESCRIPTORS = Path("/proc/self/fd")
_PATIENCE = 5.0  # seconds for another process to delete what it has locked
_POLL = 0.02


class HeldDirectory:
    """An open directory under a shared lock, until the object is gone.

    Attributes:
        path: for reading, in this process and while the object lives.
    """

    def __init__(self, directory: Path) -> None:
        """Open ``directory``.

        Raises:
            OSError: it cannot be read.
        """
        self.path = self._directory = directory
        self._descriptor: int | None = None
        if fcntl is not None:
            with suppress(PermissionError):  # entered, but not listed: by its name, as elsewhere
                self._descriptor = _open_shared(directory)
        if self._descriptor is not None:
            weakref.finalize(self, os.close, self._descriptor)
            if os.path.exists(path := _DESCRIPTORS / str(self._descriptor)):
                self.path = path

    def __reduce__(self) -> tuple[type[HeldDirectory], tuple[Path]]:
        """Copies, and those of another process, hold what has the name by then."""
        return HeldDirectory, (self._directory,)

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Keep others from holding the directory; yields False where another holds it already."""
        if self._descriptor is None:
            yield True
            return
        try:
            yield _lock_alone(self._descriptor)
        finally:
            with suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_SH)


def is_held(directory: Path) -> bool:
    """True if somebody holds a directory."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:  # on Windows no directory can be opened
        return False
    try:
        return not _lock_alone(descriptor)
    finally:
        os.close(descriptor)


def delete_unless_held(directory: Path) -> None:
    """Delete a directory with all in it as far as possible, unless somebody holds it."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        shutil.rmtree(directory, ignore_errors=True)
        return
    try:
        if _lock_alone(descriptor):
            shutil.rmtree(directory, ignore_errors=True)
    finally:
        os.close(descriptor)


def _open_shared(directory: Path) -> int:
    """Open and lock a directory; the one that has the name, should another take its place."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            held = os.path.samestat(os.fstat(descriptor), os.stat(directory))
        except BlockingIOError:
            held = False
        except FileNotFoundError:
            os.close(descriptor)
            raise
        except OSError:  # a file system without locks
            held = True
        if held or time.monotonic() > deadline:
            return descriptor
        os.close(descriptor)
        time.sleep(_POLL)


def _lock_alone(descriptor: int) -> bool:
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            pass
    return True
