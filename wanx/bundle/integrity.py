"""Problems of a bundle on disk: missing, linked, foreign or changed files, escapes.

ONNX Runtime opens whatever file a graph names, follows links and ignores checksums, so all of it
is decided here, before a session is made.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Literal

from wanx.bundle.manifest import Component, FileRecord, Manifest
from wanx.errors import CorruptInputError
from wanx.files.checksum import DigestCache, sha256_file
from wanx.files.hub_cache import cached_blob
from wanx.files.onnx_wire import external_data

Verify = Literal["auto", "full", "size"]
RECOPY_HINT = "copy or export the bundle again"

_CLOSED_FOLDERS = ("graphs", "weights", "engines")  # a file here that nobody listed is foreign
_MAX_GRAPH_BYTES = (1 << 31) - 1  # protobuf's limit


def find_problems(
    root: Path,
    manifest: Manifest,
    verify: Verify,
    digests: DigestCache,
    on_bytes: Callable[[int], None] | None,
    allow_hard_links: bool,
) -> Iterator[tuple[str, str]]:
    """Yield each problem of a bundle with the file it is about, the cheap checks first.

    Args:
        root: folder to read the bundle in.
        manifest: of the bundle.
        verify: as for ``wanx.bundle.reader.open_bundle``.
        digests: of the bundle's files.
        on_bytes: as for ``open_bundle``.
        allow_hard_links: likewise.
    """
    files = manifest.files
    whole: list[str] = []
    for name, record in files.items():
        problem = regular_file_problem(root, name, allow_hard_links) or _size_problem(
            root, name, record
        )
        if problem:
            yield name, problem
        else:
            whole.append(name)
    for name in _unlisted(root, files):
        yield name, f"{name!r} is not in the manifest, so not part of this bundle: delete it"

    damaged: set[str] = set()
    if verify != "size":
        try:
            for name in whole:
                record = files[name]
                problem = _hash_problem(root, name, record, digests, verify == "auto", on_bytes)
                if problem:
                    damaged.add(name)
                    yield name, problem
        finally:
            digests.save()

    for component in manifest.components.values():
        for graph in _graphs(component):
            if graph in whole and graph not in damaged:
                problem = _graph_problem(root, graph, component, files)
                if problem:
                    yield graph, problem


def regular_file_problem(root: Path, name: str, allow_hard_links: bool) -> str | None:
    """Check that ``name`` is a regular file that nothing outside the bundle can change.

    In the hub's cache it may be a link to its blob there.
    """
    path = root
    for part in PurePosixPath(name).parts:
        path /= part
        try:
            status = path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return f"{name} is missing: {RECOPY_HINT}"
        except OSError as error:
            return _unreadable(name, error)
        if stat.S_ISLNK(status.st_mode):
            blob = cached_blob(path)
            if blob is None:
                link = path.relative_to(root).as_posix()
                return (
                    f"{link} is a symbolic link: make a copy with real files (cp -RL) and use that"
                )
            status = blob.lstat()
    if not stat.S_ISREG(status.st_mode):
        return f"{name} is not a file: {RECOPY_HINT}"
    if status.st_nlink > 1 and not allow_hard_links:
        return (
            f"{name} has {status.st_nlink} hard links, so it can change from outside the bundle: "
            "make a real copy (cp -R) and use that"
        )
    return None


def _size_problem(root: Path, name: str, record: FileRecord) -> str | None:
    try:
        size = (root / name).stat().st_size
    except OSError as error:
        return _unreadable(name, error)
    if size == record.size:
        return None
    return f"{name} has {size} bytes, the manifest says {record.size}: {RECOPY_HINT}"


def _hash_problem(
    root: Path,
    name: str,
    record: FileRecord,
    digests: DigestCache,
    trust_cache: bool,
    on_bytes: Callable[[int], None] | None,
) -> str | None:
    path = root / name
    try:
        before = path.stat()
        digest = digests.digest(name, before) if trust_cache else None
        if digest is None:
            digest = sha256_file(path, on_bytes)
            digests.record(name, before, path.stat(), digest)
        elif on_bytes:
            on_bytes(record.size)
    except OSError as error:
        return _unreadable(name, error)
    if digest == record.sha256:
        return None
    return (
        f"{name} is damaged: its SHA-256 is {digest[:12]}…, the manifest says "
        f"{record.sha256[:12]}…: {RECOPY_HINT}"
    )


def unlisted_engines(root: Path, files: Iterable[str]) -> list[Path]:
    """Folders of engines that no listed file is in, left by a build that was killed.

    They are not part of the bundle, and nothing opens them.
    """
    listed = {PurePosixPath(name).parts[1] for name in files if name.startswith("engines/")}
    engines = root / "engines"
    folders: list[Path] = []
    if not engines.is_symlink():
        with suppress(OSError), os.scandir(engines) as entries:
            folders = [
                engines / entry.name
                for entry in entries
                if entry.name not in listed and entry.is_dir(follow_symlinks=False)
            ]
    return folders


def _unlisted(root: Path, files: dict[str, FileRecord]) -> Iterator[str]:
    leftovers = {str(path) for path in unlisted_engines(root, files)}
    for closed in _CLOSED_FOLDERS:
        if (root / closed).is_symlink():
            yield closed
            continue
        for folder, folders, names in os.walk(root / closed):
            folders[:] = [name for name in folders if os.path.join(folder, name) not in leftovers]
            links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
            for name in sorted(names + links):
                relative = (Path(folder) / name).relative_to(root).as_posix()
                if relative not in files:
                    yield relative


def _graphs(component: Component) -> list[str]:
    """Files that may be opened as graphs, whatever their names are.

    The engines of other targets are schedules; one that calls itself a graph is checked too.
    """
    return [component.graph] + [
        path
        for target, path in component.engines.items()
        if target == "cpu" or path.endswith(".onnx")
    ]


def _graph_problem(
    root: Path, graph: str, component: Component, files: dict[str, FileRecord]
) -> str | None:
    """Check that a graph reads nothing but the weights that the manifest grants it."""
    if files[graph].size > _MAX_GRAPH_BYTES:
        return (
            f"{graph} has {files[graph].size} bytes, more than an ONNX file can have: {RECOPY_HINT}"
        )
    try:
        for location, offset, length in external_data((root / graph).read_bytes()):
            if location not in component.weights:
                return (
                    f"{graph} reads {location!r:.200}, which is not among its weights in the "
                    "manifest: do not use this bundle"
                )
            end, size = offset + (length or 0), files[location].size
            if end > size:
                return (
                    f"{graph} reads up to byte {end} of {location}, which has {size}: {RECOPY_HINT}"
                )
    except CorruptInputError as error:
        return f"{graph}: {error}: {RECOPY_HINT}"
    except OSError as error:
        return _unreadable(graph, error)
    return None


def _unreadable(name: str, error: OSError) -> str:
    return f"{name} cannot be read ({error.strerror}): check its permissions and its disk"
