"""Publishes a bundle in one step: a reader sees the old one or the new one, never a part.

Everything is written into a hidden sibling of the target and renamed at the end. For a target
``b`` the siblings are

    .b.lock                 held while an export runs; the system frees it when the process dies
    .b.wanx-<pid>.partial   the bundle being written
    .b.wanx-old             the bundle being replaced, whole, between two renames
    .b.wanx-old.partial     the same on its way to deletion

Replacing renames ``b`` to ``.b.wanx-old``, the new bundle to ``b``, and only then deletes. A
process killed at any point leaves either ``b`` whole, or no ``b`` and ``.b.wanx-old`` whole; the
next export and the next opening put the latter back (``recover``).

Inside a bundle the only step is the rename of its manifest. Engines that it does not list, moved in
or not yet deleted by a process that was killed, are not part of the bundle; the next opening
removes them (``remove_unlisted``), and the siblings that dead processes left.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from wanx.bundle.integrity import unlisted_engines
from wanx.bundle.manifest import MANIFEST, FileRecord, Manifest, parse_manifest
from wanx.bundle.record import printable
from wanx.errors import UsageError, WanxError
from wanx.files.checksum import sha256_file
from wanx.files.disk import preflight_space, sync, translate_disk_errors
from wanx.interruption import cleanup_on_sigint

_OLD = "wanx-old"
_RECOVERY_SECONDS = 5.0
_CLEANING_SECONDS = 0.3  # an opening may hold the lock for a moment, to remove what was left
_LEFTOVER = re.compile(r"\.(.+)\.wanx-(?:\d+\.partial|old|old\.partial)")


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
    target = _absolute(target)
    folder = _sibling(target, f"wanx-{os.getpid()}.partial")
    with translate_disk_errors(target, folder, needed_bytes):
        _refuse_unsuitable(target)
        preflight_space(target, needed_bytes)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target, timeout=_CLEANING_SECONDS):
            _clean_up(target)
            _refuse_existing(target, force)
            with cleanup_on_sigint(lambda: _abandon(target, folder)):
                try:
                    # Here too, while the disk is still full.
                    with translate_disk_errors(target, folder, needed_bytes):
                        folder.mkdir()
                        yield folder
                        _commit(folder, target, force)
                except BaseException:
                    _clean_up(target)
                    raise


@contextmanager
def add_engines(target: str | Path) -> Iterator[tuple[Path, Callable[[Manifest], None]]]:
    """Yield an empty folder for engines to be added to the bundle ``target``, and what adds them.

    The block writes ``engines/<key>`` into the folder and calls the function with the new manifest.
    Engines that it lists no more are deleted. If the block raises, the bundle stays as it was.

    Raises:
        UsageError: another process is writing ``target``.
        WanxError: the disk is full or the place cannot be written.
    """
    target = _absolute(target)
    folder = _sibling(target, f"wanx-{os.getpid()}.partial")

    def commit(manifest: Manifest) -> None:
        engines = target / "engines"
        present = _manifest(target).files
        engines.mkdir(exist_ok=True)
        with cleanup_on_sigint(lambda: _remove_unlisted(target)):
            try:
                for new in sorted((folder / "engines").glob("*")):
                    for path in (*new.rglob("*"), new):
                        sync(path)
                    if any(name.startswith(f"engines/{new.name}/") for name in present):
                        # What a reader may have open is never replaced in place.
                        assert all(
                            present.get(name) == manifest.files[name]
                            for name in manifest.files
                            if name.startswith(f"engines/{new.name}/")
                        ), f"other engines are listed as {new.name}"
                        continue
                    shutil.rmtree(engines / new.name, ignore_errors=True)
                    os.rename(new, engines / new.name)
                sync(engines)
                write_manifest(target, manifest)
            finally:
                _remove_unlisted(target)

    with (
        translate_disk_errors(target, folder, 0),
        _locked(target, timeout=_CLEANING_SECONDS),
        cleanup_on_sigint(lambda: _abandon(target, folder)),
    ):
        _clean_up(target)
        try:
            _require_writable(target)
            folder.mkdir()
            yield folder, commit
        finally:
            _clean_up(target)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` into ``folder`` in one step, replacing one that is there."""
    temporary = _temporary_manifest(folder)
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
            digest = known.get(name) or sha256_file(path, on_bytes)
            records[name] = FileRecord(sha256=digest, size=path.stat().st_size)
    return records


def recover(target: Path) -> None:
    """Put back the bundle that a killed export had moved out of the way of ``target``.

    What dead processes left beside it is removed, where the folder can be written.

    Raises:
        UsageError: another process is writing ``target``.
        WanxError: the place cannot be written.
    """
    old = _sibling(target, _OLD)
    if not os.path.lexists(target) and old.is_dir():
        with translate_disk_errors(target, old, 0), _locked(target, timeout=_RECOVERY_SECONDS):
            _clean_up(target)
        return
    with suppress(OSError, WanxError):
        if old.is_dir() or os.path.lexists(_sibling(target, "lock")) or _partials(target):
            with _locked(target, timeout=0):
                _clean_up(target)


def remove_unlisted(target: Path, manifest: Manifest) -> None:
    """Remove the engines that the manifest of a bundle does not list, and half a manifest.

    Where another process is writing the bundle, or its folder cannot be written, nothing is done.
    """
    if unlisted_engines(target, manifest.files) or _temporary_manifest(target).exists():
        with suppress(OSError, WanxError), _locked(target, timeout=0):
            _remove_unlisted(target)


def _remove_unlisted(target: Path) -> None:
    """Remove what is not part of a bundle from its folder; the caller holds the lock."""
    with suppress(OSError, WanxError):
        for engines in unlisted_engines(target, _manifest(target).files):
            shutil.rmtree(engines, ignore_errors=True)
        _temporary_manifest(target).unlink(missing_ok=True)


def _manifest(target: Path) -> Manifest:
    path = target / MANIFEST
    return parse_manifest(path.read_bytes(), path)


def _require_writable(target: Path) -> None:
    """Raise an OSError where no manifest can be written: before hours of work, not after."""
    temporary = _temporary_manifest(target)
    try:
        temporary.touch()
    finally:
        with suppress(OSError):
            temporary.unlink()


def _temporary_manifest(folder: Path) -> Path:
    return folder / f".{MANIFEST}.partial"


def find_leftovers(folder: Path, *, remove: bool = False) -> list[Path]:
    """List what killed exports and builds left in ``folder``; remove it where asked.

    A bundle that was moved out of the way is put back. What a living process writes is left alone.
    """
    leftovers: list[Path] = []
    with suppress(OSError):
        names = sorted(os.listdir(folder))
        matches = [match for name in names if (match := _LEFTOVER.fullmatch(name))]
        for name in dict.fromkeys(match[1] for match in matches):
            with suppress(OSError, UsageError):  # read-only, or being written
                target = _absolute(folder / name)
                with _locked(target, timeout=0):
                    leftovers += [folder / match[0] for match in matches if match[1] == name]
                    if remove:
                        _clean_up(target)
    return leftovers


def _clean_up(target: Path) -> None:
    """Remove what dead exports left; the caller holds the lock, so no other is alive."""
    for name in _partials(target):
        shutil.rmtree(target.parent / name, ignore_errors=True)
    old = _sibling(target, _OLD)
    if old.is_dir():
        if not os.path.lexists(target):
            os.rename(old, target)
            sync(target.parent)
        elif _is_wanx_bundle(target):
            _discard(old)


def _abandon(target: Path, folder: Path) -> None:
    """Remove ``folder`` while other threads may write into it: they know it by its old name."""
    with suppress(OSError):
        os.rename(folder, _sibling(target, "wanx-0.partial"))
    _clean_up(target)


def _commit(folder: Path, target: Path, force: bool) -> None:
    assert (folder / MANIFEST).is_file(), "write_manifest was not called"
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))
    _refuse_existing(target, force)
    old = _sibling(target, _OLD)
    if _is_wanx_bundle(target):
        os.rename(target, old)
    elif target.is_dir():
        target.rmdir()
    os.rename(folder, target)
    sync(target.parent)
    if old.is_dir():
        with suppress(OSError):  # the new bundle is in place; the next export tries again
            _discard(old)


def _discard(old: Path) -> None:
    """Delete a replaced bundle; renamed first, since ``.wanx-old`` promises a whole bundle."""
    doomed = old.with_name(f"{old.name}.partial")
    os.rename(old, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


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


def _refuse_existing(target: Path, force: bool) -> None:
    """Refuse a target that must not be replaced; the caller holds the lock."""
    _refuse_unsuitable(target)
    if not target.exists():
        return
    if not _is_wanx_bundle(target) and any(target.iterdir()):
        raise UsageError(f"{target} exists and is not a wanx bundle: choose another name")
    if not force:
        raise UsageError(f"{target} exists: choose another name, or replace it with --force")


def _is_wanx_bundle(folder: Path) -> bool:
    """True if ``folder`` is wanx's own: other programs have a manifest.json too."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return False
    with manifest.open("rb") as file:
        return b'"wanx_version"' in file.read(1 << 16)


@contextmanager
def _locked(target: Path, timeout: float) -> Iterator[None]:
    path = _sibling(target, "lock")
    lock = FileLock(path, timeout=timeout)
    try:
        lock.acquire()
    except Timeout:
        pids = [match[1] for name in _partials(target) if (match := re.search(r"-(\d+)\.", name))]
        who = f" (pid {pids[0]})" if pids else ""
        raise UsageError(
            f"another export is writing {target}{who}: wait for it or choose another name"
        ) from None
    try:
        with cleanup_on_sigint(path.unlink):
            yield
    finally:
        with suppress(OSError):  # safe while held: filelock never grants a lock on an unlinked file
            path.unlink()
        lock.release()


def _absolute(target: str | Path) -> Path:
    text = os.fspath(target)
    if "\0" in text:
        raise UsageError(f"{printable(text)} is not a possible path")
    try:
        path = Path(os.path.abspath(text))
    except OSError as error:
        raise WanxError(
            f"the working folder cannot be used ({error.strerror}): go to another one, or give "
            f"the whole path of {printable(text)}"
        ) from None
    if not path.name:
        raise UsageError(f"{path} cannot be a bundle: give a folder inside it")
    return path


def _sibling(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name}.{suffix}")


def _partials(target: Path) -> list[str]:
    pattern = re.compile(rf"\.{re.escape(target.name)}\.wanx-(\d+|old)\.partial")
    return sorted(name for name in os.listdir(target.parent) if pattern.fullmatch(name))
