"""Repositories: which files they have, and which of them are in the hub's cache."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from wanx.errors import CorruptInputError, EnvironmentMismatchError, abbreviate
from wanx.hub.errors import one_line
from wanx.hub.reference import HubReference, stays_inside

_log = logging.getLogger("wanx.hub")
_MOST_BYTES = 1 << 46  # of a file
MAIN = "main"


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A repository at one commit.

    Attributes:
        reference: as it was asked for.
        commit: in hex.
        sizes: bytes of every file, by path.
        hashes: by which the cache calls the blob of a file: its SHA-256, or Git's hash of small
            ones; of a cache without links some may be missing.
        snapshot: its folder in the hub's cache, which may lack files, or not be there.
        offline: the hub was not asked.
    """

    reference: HubReference
    commit: str
    sizes: Mapping[str, int]
    hashes: Mapping[str, str]
    snapshot: Path
    offline: bool = False

    @property
    def cache(self) -> Path:
        """Folder of the hub's cache."""
        return self.snapshot.parents[2]

    def cached(self, name: str) -> Path | None:
        """A file in the cache, of this snapshot or of another one; None where it is not there."""
        if (path := self.snapshot / name).exists():
            return path
        blob = self.snapshot.parents[1] / "blobs" / self.hashes.get(name, "-")
        return blob if blob.exists() else None

    def missing(self, names: Iterable[str]) -> list[str]:
        """Files that are not in the cache."""
        return [name for name in names if self.cached(name) is None]

    def bytes_of(self, names: Iterable[str]) -> int:
        """Bytes of files."""
        return sum(self.sizes[name] for name in names)


def open_repository(reference: HubReference) -> Repository:
    """List a repository; where the hub is not reached, as the cache knows it.

    Raises:
        CorruptInputError: it lists files that no repository can have.
        EnvironmentMismatchError: ``huggingface_hub`` is not installed, a token is missing, or the
            hub is not reached and the cache knows nothing.
        UsageError: there is no such repository or revision.
    """
    if find_spec("huggingface_hub") is None:
        raise EnvironmentMismatchError(
            f"{reference} does not exist here; to fetch it from the hub takes huggingface_hub: "
            "pip install 'wanx[hub]'"
        )
    from huggingface_hub import HfApi, constants

    with quiet():
        try:
            with one_line(reference):
                info = HfApi().model_info(
                    reference.repository, revision=reference.revision, files_metadata=True,
                    timeout=constants.HF_HUB_ETAG_TIMEOUT,
                )  # fmt: skip
        except EnvironmentMismatchError as error:
            if known := _cached(reference):
                _log.warning("%s; taken as the cache has it", str(error).partition(";")[0])
                return known
            raise
    files = info.siblings or []
    if odd := [f.rfilename for f in files if not (stays_inside(f.rfilename) and _size_is_sane(f))]:
        raise CorruptInputError(
            f"{reference} lists {abbreviate(odd)}, which no repository can have; check HF_ENDPOINT"
        )
    assert info.sha is not None
    return Repository(
        reference=reference,
        commit=info.sha,
        sizes={file.rfilename: file.size or 0 for file in files},
        hashes={f.rfilename: h for f in files if (h := f.lfs.sha256 if f.lfs else f.blob_id)},
        snapshot=_folder(reference) / "snapshots" / info.sha,
    )


def _size_is_sane(file: Any) -> bool:
    return 0 <= (file.size or 0) < _MOST_BYTES


def _folder(reference: HubReference) -> Path:
    """Folder of a repository in the hub's cache."""
    from huggingface_hub import constants

    cache = Path(os.path.realpath(os.path.expanduser(constants.HF_HUB_CACHE)))
    return cache / f"models--{reference.repository.replace('/', '--')}"


def _cached(reference: HubReference) -> Repository | None:
    """A repository as the cache has it; None where nothing of it is there."""
    folder, revision = _folder(reference), reference.revision or MAIN
    commit = revision
    with suppress(OSError, ValueError):
        commit = (folder / "refs" / revision).read_text().strip()
    snapshot = folder / "snapshots" / commit
    if "/" in commit or not snapshot.is_dir():
        return None
    files = [path for path in snapshot.rglob("*") if path.is_file()]
    sizes = {path.relative_to(snapshot).as_posix(): path.stat().st_size for path in files}
    hashes = {name: blob.name for name in sizes if (blob := _blob(snapshot / name))}
    with suppress(Exception):  # versions that keep no listing
        from huggingface_hub import get_cached_repo_tree

        for file in get_cached_repo_tree(reference.repository, revision=commit):
            if stays_inside(file.path):
                sizes[file.path] = file.size
    return Repository(
        reference=reference, commit=commit, sizes=sizes, hashes=hashes, snapshot=snapshot,
        offline=True,
    )  # fmt: skip


def _blob(file: Path) -> Path | None:
    """Blob that a file of a snapshot is a link to; its name is a hash.

    None where the cache has copies instead, as on Windows. The blob may be a link itself, to one
    that several repositories share, which has another kind of hash for its name.
    """
    return file.parent / os.readlink(file) if file.is_symlink() else None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what ``huggingface_hub`` logs to itself, except errors."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
