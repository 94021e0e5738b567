"""SHA-256 of files, and a cache of the digests of files that have not changed since."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import platformdirs

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
        cache = platformdirs.user_cache_path("wanx", appauthor=False)
        key = hashlib.sha256(os.fsencode(folder)).hexdigest()
        # Without a home folder the path stays relative, "~/.cache": it would land in the cwd.
        self._path = cache / "verified" / f"{key}.json" if cache.is_absolute() else None
        self._entries: dict[str, list[object]] = {}
        self._changed = False
        with suppress(OSError, ValueError, RecursionError):
            loaded = json.loads(self._path.read_bytes()) if self._path else {}
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
        if not self._changed or self._path is None:
            return
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self._path.parent)
            try:
                with open(handle, "w", encoding="utf-8") as file:
                    json.dump(self._entries, file)
                os.replace(temporary, self._path)
            except BaseException:
                os.unlink(temporary)
                raise


def _identity(stat: os.stat_result) -> list[object]:
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
