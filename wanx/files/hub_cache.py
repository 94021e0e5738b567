"""The Hugging Face hub's cache, in which the files of a snapshot are links to blobs.

``models--owner--name/snapshots/COMMIT/FILE`` leads to ``models--owner--name/blobs/HASH``, which may
itself lead to ``blobs/`` of the whole cache, where repositories share what is equal.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from wanx.errors import CorruptInputError
from wanx.files.onnx_wire import renamed_locations

_REPOSITORY = re.compile(r"(?:models|datasets|spaces)--.+")


def is_snapshot(folder: Path) -> bool:
    """True if a folder is a snapshot of the hub's cache, whether its files are links or copies."""
    real = Path(os.path.realpath(folder))
    return real.parent.name == "snapshots" and bool(_REPOSITORY.fullmatch(real.parents[1].name))


def hub_name(path: Path) -> str | None:
    """``owner/name@commit`` of a snapshot, and of a file in one; None for any other path."""
    parts = Path(os.path.abspath(path)).parts
    for number, part in enumerate(parts[1:-1], 1):
        if part == "snapshots" and _REPOSITORY.fullmatch(parts[number - 1]):
            _, owner, *name = parts[number - 1].split("--")
            rest = "/".join(parts[number + 2 :])
            repository = f"{owner}/{'--'.join(name)}@{parts[number + 1]}"
            return f"{repository}/{rest}" if rest else repository
    return None


def without_links(root: Path, model: bytes) -> tuple[Path, bytes]:
    """Give an ONNX graph its weights by their own paths, where a snapshot has links to them.

    ONNX Runtime opens no external data that a link leads out of the folder to.

    Args:
        root: the folder that locations of weights are relative to.
        model: the serialised graph.

    Returns:
        The same two, or the cache and a graph whose locations are relative to it.

    Raises:
        CorruptInputError: a link leads out of the cache, which was not so when it was checked.
    """
    if not is_snapshot(root):
        return root, model
    real = Path(os.path.realpath(root))
    cache = real.parents[2]

    def rename(location: str) -> str:
        path = Path(os.path.realpath(real / location))
        if not path.is_relative_to(cache):
            raise CorruptInputError(f"{real / location} leads out of the hub's cache; remove it")
        return path.relative_to(cache).as_posix()

    return cache, renamed_locations(model, rename)


def cached_blob(link: Path) -> Path | None:
    """Blob that a link in a snapshot leads to; None for any other link.

    Args:
        link: a symbolic link.

    Returns:
        A path without links, of a regular file that nothing but the cache names.
    """
    folder = Path(os.path.realpath(link.parent))
    repository = next(
        (p.parent for p in (folder, *folder.parents) if p.name == "snapshots"), None
    )  # fmt: skip
    if repository is None or not _REPOSITORY.fullmatch(repository.name):
        return None
    blob = Path(os.path.realpath(link))
    shared = repository.parent / "blobs"
    if blob.parent != repository / "blobs" and blob.parent.parent != shared:
        return None
    try:
        status = blob.lstat()
    except OSError:
        return None
    return blob if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 else None
