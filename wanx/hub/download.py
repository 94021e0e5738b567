"""Downloads into the Hugging Face hub's cache, checked against the hub's hashes."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib import import_module
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
from wanx.hub.repository import MAIN, Repository, quiet
from wanx.interruption import cleanup_on_sigint, result_of
from wanx.progress import Progress, byte_counter, no_progress

_log = logging.getLogger("wanx.hub")
_RESERVE = 1 << 30  # of the disk, that a download leaves
_SAID = 1 << 20  # bytes, below which a download is not worth a line
_PATIENCE, _POLL = 2.0, 0.05  # seconds for a download to stop
_GIT, _SHA256 = 40, 64  # lengths of hashes in hex


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
        count = repository.bytes_of(coming)
        free = require_space(repository, coming) if coming else 0
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
    revision = repository.reference.revision or MAIN
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
    with quiet(), one_line(reference), cleanup_on_sigint(lambda: _end(repository, stop)):
        done = pool.submit(partial(snapshot_download, reference.repository, **options))
        try:
            result_of(done)
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

    Bar.set_lock(threading.RLock())  # tqdm's own would start a process
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


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
