"""Repositories: which files they have, which of them are in the cache, and downloading others."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from wanx.errors import (
    CancelledError,
    CorruptInputError,
    EnvironmentMismatchError,
    WanxError,
    abbreviate,
)
from wanx.files.checksum import DigestCache, sha256_file
from wanx.hub.errors import one_line
from wanx.hub.reference import HubReference, stays_inside
from wanx.interruption import cleanup_on_sigint
from wanx.progress import Progress, byte_counter, no_progress

_log = logging.getLogger("wanx.hub")
_RESERVE = 1 << 30  # of the disk, that a download leaves
_SAID = 1 << 20  # bytes, below which a download is not worth a line
_PATIENCE, _POLL = 2.0, 0.05  # seconds for a download to stop
_MOST_BYTES = 1 << 46  # of a file
_MAIN = "main"
_GIT, _SHA256 = 40, 64  # lengths of hashes in hex


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

    with _quiet():
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
    folder, revision = _folder(reference), reference.revision or _MAIN
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


def download(
    repository: Repository, names: Iterable[str], progress: Progress = no_progress
) -> Path:
    """Download files into the hub's cache, unless they are there, and check their hashes.

    Args:
        repository: to take them from.
        names: of the files.
        progress: told how many bytes have arrived, and how many are checked.

    Returns:
        The folder of the snapshot, in which they are links to the cache's blobs.

    Raises:
        CorruptInputError: a file is not what the hub says; it is removed from the cache.
        EnvironmentMismatchError: it may not be read, or the hub is not reached.
        WanxError: the disk has no room for it.
    """
    wanted = sorted(names)
    absent = [name for name in wanted if not (repository.snapshot / name).exists()]
    coming = repository.missing(absent)
    if absent and repository.offline:
        raise EnvironmentMismatchError(
            f"the hub is not reached, and the cache has {len(wanted) - len(absent)} of "
            f"{len(wanted)} files of {repository.reference}, not {abbreviate(absent, 3)}; "
            "go online, and unset HF_HUB_OFFLINE"
        )
    if absent:
        free, count = require_space(repository, coming), repository.bytes_of(coming)
        if count >= _SAID:
            _log.info(
                "downloading %s of %s (%d files) to %s, whose disk has %s free",
                _gigabytes(count), repository.reference, len(coming), repository.cache,
                _gigabytes(free),
            )  # fmt: skip
        _fetch(repository, absent, repository.bytes_of(coming), progress)
    _remember(repository)
    _verify(repository, wanted, progress)
    return repository.snapshot


def _remember(repository: Repository) -> None:
    """Note which commit a revision is, as ``huggingface_hub`` does when it resolves one."""
    revision = repository.reference.revision or _MAIN
    path = repository.snapshot.parents[1] / "refs" / revision
    if not repository.offline and revision != repository.commit:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(repository.commit)


def require_space(repository: Repository, names: Iterable[str], beside: int = 0) -> int:
    """Check that the disk of the hub's cache has room for files.

    Args:
        repository: of the files.
        names: that are to come.
        beside: bytes that the same disk is to take beside them.

    Returns:
        Bytes that are free.

    Raises:
        WanxError: it has not.
    """
    cache, needed = repository.cache, repository.bytes_of(names)
    place = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < needed + beside + _RESERVE:
        more = f" and {_gigabytes(beside)} beside them" if beside else ""
        raise WanxError(
            f"{repository.reference} brings {_gigabytes(needed)}{more}, and the disk of {cache} "
            f"has {_gigabytes(free)} free; free some space, or set HF_HOME to another disk"
        )
    return free


def _fetch(repository: Repository, names: list[str], total: int, progress: Progress) -> None:
    from huggingface_hub import snapshot_download

    stop, reference = threading.Event(), repository.reference
    progress("download", 0, total, "bytes")
    options: dict[str, Any] = {
        "revision": repository.commit,
        "allow_patterns": [glob.escape(name) for name in names],
        "tqdm_class": _bar_class(total, progress, stop),
    }
    pool = ThreadPoolExecutor(max_workers=1)
    with _quiet(), one_line(reference), cleanup_on_sigint(lambda: _end(repository, stop)):
        done = pool.submit(partial(snapshot_download, reference.repository, **options))
        try:
            done.result()
        except BaseException:
            _end(repository, stop)
            raise
        finally:
            pool.shutdown(wait=False)
    progress("download", total, total, "bytes")


def _end(repository: Repository, stop: threading.Event) -> None:
    """Stop a download and remove files that it has begun, which no other can go on with.

    Its threads hear of it at their next piece of a file, which may take a while to come; until
    then one may begin another file.
    """
    stop.set()
    deadline, calm = time.monotonic() + _PATIENCE, 0
    while calm < 3 and time.monotonic() < deadline:
        calm = 0 if _remove_incomplete(repository) else calm + 1
        time.sleep(_POLL)


def _remove_incomplete(repository: Repository) -> int:
    """Remove files that this process is downloading; returns how many."""
    blobs, count = repository.snapshot.parents[1] / "blobs", 0
    with suppress(OSError):  # where there is no such folder, they stay
        for descriptor in Path("/proc/self/fd").iterdir():
            with suppress(OSError):
                path = Path(os.readlink(descriptor))
                if path.parent == blobs and path.suffix == ".incomplete":
                    path.unlink()
                    count += 1
    return count


def _bar_class(total: int, progress: Progress, stop: threading.Event) -> type:
    """Class in the place of tqdm's, which counts the bytes of all files together.

    ``snapshot_download`` makes a bar of the bytes that arrive, one of those that are written, and
    one of files.
    """
    base: Any = import_module("tqdm.auto").tqdm
    counts: dict[int, float] = {}
    lock = threading.Lock()

    class Bar(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            self.in_bytes = options.get("unit") == "B"
            self.arrived = options.get("initial") or 0
            options.pop("name", None)
            super().__init__(*args, **options | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            if stop.is_set():
                raise CancelledError("the download was stopped; what is complete is kept")
            if self.in_bytes:
                with lock:
                    self.arrived += n or 0
                    counts[id(self)] = self.arrived
                    done = min(int(max(counts.values())), total - 1)
                    progress("download", max(done, 0), total, "bytes")

    return Bar


def _verify(repository: Repository, names: list[str], progress: Progress) -> None:
    """Compare files with the hashes that the hub has for them, each once.

    Raises:
        CorruptInputError: one differs; it is removed, so that it is downloaded again.
    """
    snapshot = repository.snapshot
    digests = DigestCache(snapshot)
    unread = []
    for name in names:
        path, known = snapshot / name, repository.hashes.get(name, "")
        if len(known) == _GIT and _git_hash(path) != known:
            raise _refused(repository, name)
        if len(known) == _SHA256 and digests.digest(name, path.stat()) != known:
            unread.append(name)
    count = byte_counter(progress, "check hashes", repository.bytes_of(unread))
    try:
        for name in unread:
            path = snapshot / name
            before = path.stat()
            digest = sha256_file(path, count)
            if digest != repository.hashes[name]:
                raise _refused(repository, name)
            digests.record(name, before, path.stat(), digest)
    finally:
        digests.save()


def _blob(file: Path) -> Path | None:
    """Blob that a file of a snapshot is a link to; its name is a hash.

    None where the cache has copies instead, as on Windows. The blob may be a link itself, to one
    that several repositories share, which has another kind of hash for its name.
    """
    return file.parent / os.readlink(file) if file.is_symlink() else None


def _git_hash(path: Path) -> str:
    """Hash by which Git, and so the hub, knows a file that is not stored with LFS."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _refused(repository: Repository, name: str) -> CorruptInputError:
    """Remove a file from the cache, with the blobs that it leads to."""
    path = repository.snapshot / name
    seen: list[Path] = []
    while path.is_symlink() and len(seen) < 3:
        seen.append(path)
        path = path.parent / os.readlink(path)
    if Path(os.path.realpath(path)).is_relative_to(repository.cache):
        seen.append(path)
    for each in seen:
        with suppress(OSError):
            each.unlink()
    return CorruptInputError(
        f"{name} of {repository.reference} is not what the hub says: its hash differs; it was "
        "removed from the cache, so run the command again"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what ``huggingface_hub`` logs to itself, except errors."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
