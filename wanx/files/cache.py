"""User's cache folder of wanx: digests, calibrations, compiled kernels, notes of built engines."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import platformdirs

from wanx.files.atomic import replacing


def cache_path(*parts: str) -> Path | None:
    """Path below the user's cache folder; None where there is no home folder.

    That is so for a user whom the system does not know, as in many containers. Old versions of
    platformdirs then return a relative path, which would land in the working folder.
    """
    try:
        folder = platformdirs.user_cache_path("wanx", appauthor=False)
    except RuntimeError:
        return None
    return folder.joinpath(*parts) if folder.is_absolute() else None


def read_cached(path: Path | None) -> bytes:
    """Bytes of a cache file; empty where there is none, or it cannot be read."""
    if path is not None:
        with suppress(OSError):
            return path.read_bytes()
    return b""


def write_cached(path: Path | None, data: bytes) -> None:
    """Write a cache file whole or not at all; where it cannot be written, nothing fails."""
    if path is None:
        return
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(data)
