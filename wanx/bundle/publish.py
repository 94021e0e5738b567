"""Publishes a bundle in one step: a reader sees the old one or the new one, never a part.

Everything is written into a hidden sibling of the target and renamed at the end. For a target
``b`` the siblings are

    .b.lock                 held while an export runs; the system frees it when the process dies
    .b.wanx-<pid>.partial   the bundle being written
    .b.wanx-old             the bundle being replaced, whole, between two renames
    .b.wanx-old.1.partial   the same on its way to deletion, which waits for those who read it

Replacing renames ``b`` to ``.b.wanx-old``, the new bundle to ``b``, and only then deletes. A
process killed at any point leaves either ``b`` whole, or no ``b`` and ``.b.wanx-old`` whole; the
next export and the next opening put the latter back (``wanx.bundle.recovery``).

Inside a bundle the only step is the rename of its manifest. Engines that it does not list, moved in
or not yet deleted by a process that was killed, are not part of the bundle; the next opening
removes them (``remove_unlisted``), and the siblings that dead processes left.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from wanx.bundle.manifest import MANIFEST, FileRecord, Manifest
from wanx.bundle.reader import Bundle
from wanx.bundle.recovery import (
    OLD,
    abandon,
    absolute,
    clean_up,
    clear_unlisted,
    discard,
    is_wanx_bundle,
    locked,
    manifest_of,
    sibling,
    temporary_manifest,
)
from wanx.errors import UsageError
from wanx.files.checksum import sha256_file
from wanx.files.disk import preflight_space, sync, translate_disk_errors
from wanx.interruption import cleanup_on_sigint

_CLEANING_SECONDS = 0.3  # an opening may hold the lock for a moment, to remove what was left


@contextmanager
def publish_bundle(
    target: str | Path, *, force: bool = False, needed_bytes: int = 0
) -> Iterator[Path]:
    """Yield an empty folder; when the block ends well, it becomes ``target``.

    The block writes the bundle into the folder and calls ``write_manifest`` last. If it raises,
    the folder is removed and ``target`` stays as it was.

    Args:
        target: where the bundle will be; parent folders are created.
        force: replace a bundle (or an empty folder) that is already there; nothing else ever is.
        needed_bytes: size of what will be written, checked against the free space beforehand.

    Raises:
        UsageError: ``target`` is taken, or another process is writing it.
        WanxError: the disk is full or the place cannot be written.
    """
    target = absolute(target)
    folder = sibling(target, f"wanx-{os.getpid()}.partial")
    with translate_disk_errors(target, folder, needed_bytes):
        _refuse_unsuitable(target)
        preflight_space(target, needed_bytes)
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target, timeout=_CLEANING_SECONDS):
            clean_up(target)
            refuse_existing(target, force)
            with cleanup_on_sigint(lambda: abandon(target, folder)):
                try:
                    # Here too, while the disk is still full.
                    with translate_disk_errors(target, folder, needed_bytes):
                        folder.mkdir()
                        yield folder
                        _commit(folder, target, force)
                except BaseException:
                    clean_up(target)
                    raise


@contextmanager
def add_engines(bundle: Bundle) -> Iterator[tuple[Path, Callable[[Manifest], None]]]:
    """Yield an empty folder for engines to be added to a bundle, and what adds them.

    The block writes ``engines/<key>``, a key that the bundle does not list, into the folder and
    calls the function with the new manifest. Engines that it lists no more are deleted, now or once
    nobody reads the bundle as it was. If the block raises, the bundle stays as it was.

    Raises:
        UsageError: another process is writing the bundle.
        WanxError: the disk is full or the place cannot be written.
    """
    target, directory = bundle.root, bundle.directory
    assert directory is not None, "the bundle was not opened"
    folder = sibling(target, f"wanx-{os.getpid()}.partial")

    def commit(manifest: Manifest) -> None:
        engines = target / "engines"
        present = manifest_of(target).files
        engines.mkdir(exist_ok=True)
        with cleanup_on_sigint(lambda: clear_unlisted(target, directory)):
            try:
                for new in sorted((folder / "engines").glob("*")):
                    for path in (*new.rglob("*"), new):
                        sync(path)
                    # What a reader may have open is never replaced in place.
                    assert not any(name.startswith(f"engines/{new.name}/") for name in present)
                    shutil.rmtree(engines / new.name, ignore_errors=True)
                    os.rename(new, engines / new.name)
                sync(engines)
                write_manifest(target, manifest)
            finally:
                clear_unlisted(target, directory)

    with (
        translate_disk_errors(target, folder, 0),
        locked(target, timeout=_CLEANING_SECONDS),
        cleanup_on_sigint(lambda: abandon(target, folder)),
    ):
        clean_up(target)
        try:
            _require_writable(target)
            folder.mkdir()
            yield folder, commit
        finally:
            clean_up(target)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` into ``folder`` in one step, replacing one that is there."""
    temporary = temporary_manifest(folder)
    temporary.write_bytes(manifest.to_json())
    sync(temporary)
    os.replace(temporary, folder / MANIFEST)
    sync(folder)


def record_files(
    folder: Path,
    *,
    known: Mapping[str, str] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> dict[str, FileRecord]:
    """Describe the files under ``folder``, sorted by path, for ``Manifest.files``.

    Args:
        folder: a bundle that is being written.
        known: SHA-256 in hex by path, for files that were hashed while they were written.
        on_bytes: told how many bytes were hashed, in portions.
    """
    known = known or {}
    records = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name != MANIFEST:
            records[name] = record_file(path, known.get(name), on_bytes)
    return records


def record_file(
    path: Path, known: str | None = None, on_bytes: Callable[[int], None] | None = None
) -> FileRecord:
    """Describe one file; see :func:`record_files`."""
    digest = known or sha256_file(path, on_bytes)
    return FileRecord(sha256=digest, size=path.stat().st_size)


def _require_writable(target: Path) -> None:
    """Raise an OSError where no manifest can be written: before hours of work, not after."""
    temporary = temporary_manifest(target)
    try:
        temporary.touch()
    finally:
        with suppress(OSError):
            temporary.unlink()


def _commit(folder: Path, target: Path, force: bool) -> None:
    assert (folder / MANIFEST).is_file(), "write_manifest was not called"
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))
    refuse_existing(target, force)
    old = sibling(target, OLD)
    if is_wanx_bundle(target):
        os.rename(target, old)
    elif target.is_dir():
        target.rmdir()
    os.rename(folder, target)
    sync(target.parent)
    if old.is_dir():
        with suppress(OSError):  # the new bundle is in place; the next export tries again
            discard(old)


def _refuse_unsuitable(target: Path) -> None:
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        raise UsageError(f"{target} is a link: give the folder it points to, {os.readlink(target)}")
    if not stat.S_ISDIR(mode):
        raise UsageError(f"{target} is a file: choose another name")
    if os.path.ismount(target):
        raise UsageError(f"{target} is a mount point: choose a folder inside it")


def refuse_existing(target: Path, force: bool) -> None:
    """Refuse a target that must not be replaced; to rely on it, the caller holds the lock.

    Raises:
        UsageError: it is there, and ``force`` was not given, or it is not wanx's own.
    """
    _refuse_unsuitable(target)
    if not target.exists():
        return
    if not is_wanx_bundle(target) and any(target.iterdir()):
        raise UsageError(f"{target} exists and is not a wanx bundle: choose another name")
    if not force:
        raise UsageError(f"{target} exists: choose another name, or replace it with --force")
