"""Hidden files that outputs grow in, and the removal of those that dead processes left.

Each has a lock, which the system frees when its process dies, however it dies. Claims are hidden
files with a lock too (``wanx.runtime.output.claims``).
"""

from __future__ import annotations

import os
import re
import uuid
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NAME = re.compile(r"\.wanx-[0-9a-f]{32}\.(tmp|lock)")


def create_temporary(folder: Path) -> tuple[Path, int]:
    """Create an empty file in ``folder``; return its path, and a descriptor that holds its lock.

    Raises:
        OSError: The file cannot be created.
    """
    while True:
        path = folder / f".wanx-{uuid.uuid4().hex}.tmp"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        _lock(descriptor)
        # Until it was locked, another process could take it for that of a dead one.
        if path.exists():
            return path, descriptor
        os.close(descriptor)


def find_leftovers(folder: Path, *, remove: bool = False) -> list[Path]:
    """List the files in ``folder`` whose processes are dead; remove them where asked."""
    leftovers = []
    with suppress(OSError):
        for name in sorted(os.listdir(folder)):
            if _NAME.fullmatch(name) and _is_left(folder / name, remove):
                leftovers.append(folder / name)
    return leftovers


def _is_left(path: Path, remove: bool) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return False
    try:
        if not _lock(descriptor):
            return False
        if remove:
            path.unlink()
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _lock(descriptor: int) -> bool:
    """Take the lock; false where another process holds it, or where files have no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
