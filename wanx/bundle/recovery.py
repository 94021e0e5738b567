"""Hidden siblings of a bundle, its lock, and the removal of what processes that were killed left.

``wanx.bundle.publish`` says what the siblings are and in which order they come and go.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import Timeout

from wanx.bundle.integrity import unlisted_engines
from wanx.bundle.manifest import MANIFEST, Manifest, parse_manifest
from wanx.bundle.record import printable
from wanx.errors import UsageError, WanxError
from wanx.files.disk import sync, translate_disk_errors
from wanx.files.file_lock import locked_file
from wanx.files.held_directory import HeldDirectory, delete_unless_held, is_held

OLD = "wanx-old"
_RECOVERY_SECONDS = 5.0
_LEFTOVER = re.compile(r"\.(.+)\.wanx-(?:\d+\.partial|old|old(?:\.\d+)?\.partial)")


def recover(target: Path) -> None:
    """Put back the bundle that a killed export had moved out of the way of ``target``.

    What dead processes left beside it is removed, where the folder can be written.

    Raises:
        UsageError: another process is writing ``target``.
        WanxError: the place cannot be written.
    """
    old = sibling(target, OLD)
    if not os.path.lexists(target) and old.is_dir():
        with translate_disk_errors(target, old, 0), locked(target, timeout=_RECOVERY_SECONDS):
            clean_up(target)
        return
    with suppress(OSError, WanxError):
        if old.is_dir() or os.path.lexists(sibling(target, "lock")) or _partials(target):
            with locked(target, timeout=0):
                clean_up(target)


def remove_unlisted(target: Path, manifest: Manifest, directory: HeldDirectory) -> None:
    """Remove the engines that the manifest of a bundle does not list, and half a manifest.

    Where another process is writing or reading the bundle, or its folder cannot be written, nothing
    is done.
    """
    if unlisted_engines(target, manifest.files) or temporary_manifest(target).exists():
        with suppress(OSError, WanxError), locked(target, timeout=0):
            clear_unlisted(target, directory)


def clear_unlisted(target: Path, directory: HeldDirectory) -> None:
    """Remove what is not part of a bundle from its folder; the caller holds the lock.

    Another process that reads the bundle may have opened it before they were left out.
    """
    with suppress(OSError, WanxError):
        temporary_manifest(target).unlink(missing_ok=True)
        with directory.alone() as alone:
            if alone:
                held = directory.path
                for engines in unlisted_engines(held, manifest_of(held).files):
                    shutil.rmtree(engines, ignore_errors=True)


def manifest_of(target: Path) -> Manifest:
    """Manifest of a bundle, read and parsed but not compared with its files."""
    path = target / MANIFEST
    return parse_manifest(path.read_bytes(), path)


def temporary_manifest(folder: Path) -> Path:
    """Path of the manifest that is being written into a bundle."""
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
                target = absolute(folder / name)
                with locked(target, timeout=0):
                    own = [folder / match[0] for match in matches if match[1] == name]
                    leftovers += [path for path in own if not is_held(path)]
                    if remove:
                        clean_up(target)
    return leftovers


def clean_up(target: Path) -> None:
    """Remove what dead exports left; the caller holds the lock, so no other is alive."""
    for name in _partials(target):
        delete_unless_held(target.parent / name)
    old = sibling(target, OLD)
    if old.is_dir():
        if not os.path.lexists(target):
            os.rename(old, target)
            sync(target.parent)
        elif is_wanx_bundle(target):
            discard(old)


def abandon(target: Path, folder: Path) -> None:
    """Remove ``folder`` while other threads may write into it: they know it by its old name."""
    with suppress(OSError):
        os.rename(folder, sibling(target, "wanx-0.partial"))
    clean_up(target)


def discard(old: Path) -> None:
    """Delete a replaced bundle, or leave it to its last reader's next command.

    Renamed first, since ``.wanx-old`` promises a whole bundle.
    """
    names = (old.with_name(f"{old.name}.{number}.partial") for number in itertools.count(1))
    doomed = next(name for name in names if not os.path.lexists(name))
    os.rename(old, doomed)
    delete_unless_held(doomed)


def is_wanx_bundle(folder: Path) -> bool:
    """True if ``folder`` is wanx's own: other programs have a manifest.json too."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return False
    with manifest.open("rb") as file:
        return b'"wanx_version"' in file.read(1 << 16)


@contextmanager
def locked(target: Path, timeout: float) -> Iterator[None]:
    """Hold the lock of ``target``, waiting ``timeout`` seconds for it.

    Raises:
        UsageError: another process holds it.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked_file(sibling(target, "lock"), timeout))
        except Timeout:
            pids = [m[1] for name in _partials(target) if (m := re.search(r"-(\d+)\.", name))]
            who = f" (pid {pids[0]})" if pids else ""
            raise UsageError(
                f"another export is writing {target}{who}: wait for it or choose another name"
            ) from None
        yield


def absolute(target: str | Path) -> Path:
    """Absolute path of a bundle.

    Raises:
        UsageError: no bundle can have it.
        WanxError: it is relative to a working folder that is gone.
    """
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


def sibling(target: Path, suffix: str) -> Path:
    """Path of a hidden sibling of ``target``."""
    return target.with_name(f".{target.name}.{suffix}")


def _partials(target: Path) -> list[str]:
    pattern = re.compile(rf"\.{re.escape(target.name)}\.wanx-(\d+|old(?:\.\d+)?)\.partial")
    return sorted(name for name in os.listdir(target.parent) if pattern.fullmatch(name))
