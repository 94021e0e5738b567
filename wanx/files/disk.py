"""Errors of a full, failing or read-only disk, in one line."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wanx.errors import WanxError


def preflight_space(target: Path, needed_bytes: int) -> None:
    """Check that the disk of ``target`` has ``needed_bytes`` free.

    Raises:
        WanxError: it has not.
    """
    free = _free_bytes(target)
    if free < needed_bytes:
        raise WanxError(
            f"{target} needs {_megabytes(needed_bytes)}, its disk has {_megabytes(free)} free: "
            "free some space or choose another disk"
        )


@contextmanager
def translate_disk_errors(target: Path, folder: Path, needed_bytes: int) -> Iterator[None]:
    """Turn a full disk, or any failure to write at ``target``, into one line."""
    try:
        yield
    except WanxError:
        raise
    except Exception as error:
        if _is_disk_full(error):
            written = sum(path.lstat().st_size for path in folder.rglob("*"))
            available = written + _free_bytes(target)
            needs = _megabytes(needed_bytes) if needed_bytes > available else "more"
            raise WanxError(
                f"the disk is full: {target} needs {needs}, {_megabytes(available)} were free: "
                "free some space or choose another disk"
            ) from error
        if isinstance(error, OSError) and isinstance(error.filename, str):
            path = Path(error.filename)
            ours = path.parent == target.parent and path.name.startswith(f".{target.name}.")
            if ours or path.is_relative_to(folder) or target.is_relative_to(path):
                raise WanxError(
                    f"cannot write {path}: {error.strerror}: choose another place"
                ) from error
            if path.is_relative_to(target):
                raise WanxError(
                    f"cannot write {path}: {error.strerror}: make {target} writable, or use a copy "
                    "of it"
                ) from error
        raise


def _is_disk_full(error: BaseException | None) -> bool:
    while error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def same_disk(first: Path, second: Path) -> bool:
    """True if two absolute paths are on one disk, or would be."""
    return os.stat(_existing(first)).st_dev == os.stat(_existing(second)).st_dev


def _free_bytes(target: Path) -> int:
    return shutil.disk_usage(_existing(target.parent)).free


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.parents) if p.exists())


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's entries, survive a power loss."""
    windows = os.name == "nt"
    if windows and path.is_dir():
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(handle)
