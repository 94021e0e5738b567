"""SHA-256 of files, and a cache of the digests of files that have not changed since."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from wanx.files.cache import cache_path, read_cached, write_cached

_CHUNK = 1 << 20
_SETTLED_NS = 2_000_000_000  # coarsest timestamp of a file system in use (FAT)


def sha256_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file in hex, read in constant memory.

    Args:
        path: file to read.
        on_bytes: told after each chunk how many bytes it had.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    chunk = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(chunk):
            digest.update(chunk[:size])
            if on_bytes:
                on_bytes(size)
    return digest.hexdigest()


class DigestCache:
    """Cache, in the user's cache folder, of the digests of the files under one folder.

    An entry holds as long as size, inode, mtime and ctime stay: ctime cannot be set back, so a file
    that was written to is hashed again. Damage below the file system (a rotting disk) does not show
    here. Where the cache cannot be read or written, nothing is remembered and nothing fails.
    """

    def __init__(self, folder: Path) -> None:
        """Load what is remembered about the files under ``folder``."""
        key = hashlib.sha256(os.fsencode(folder)).hexdigest()
        self._path = cache_path("verified", f"{key}.json")
        self._entries: dict[str, list[object]] = {}
        self._changed = False
        with suppress(ValueError, RecursionError):
            loaded = json.loads(read_cached(self._path))
            self._entries = loaded if isinstance(loaded, dict) else {}

    def digest(self, name: str, stat: os.stat_result) -> str | None:
        """The digest recorded for ``name``, unless the file may have changed since."""
        match self._entries.get(name):
            case [str(digest), *identity] if identity == _identity(stat):
                return digest
        return None

    def record(self, name: str, before: os.stat_result, after: os.stat_result, digest: str) -> None:
        """Remember the digest of a file whose status was taken before and after it was read."""
        stat = _identity(before)
        if stat != _identity(after) or time.time_ns() - before.st_ctime_ns < _SETTLED_NS:
            return  # it changed, or a later write within the clock's tick would go unseen
        self._entries[name] = [digest, *stat]
        self._changed = True

    def save(self) -> None:
        """Write what was recorded, in one step."""
        if self._changed:
            write_cached(self._path, json.dumps(self._entries).encode())


def _identity(stat: os.stat_result) -> list[object]:
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
