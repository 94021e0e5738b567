"""Graphs that a target of ONNX Runtime runs instead of the portable ones."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import re
from pathlib import Path, PurePosixPath

from wanx.bundle.manifest import FileRecord, Manifest
from wanx.bundle.publish import record_files
from wanx.errors import WanxError
from wanx.exporter.component_writer import graph_bytes
from wanx.exporter.graph.cache import GraphCache
from wanx.exporter.targets.base import Target
from wanx.progress import Progress, no_progress

_log = logging.getLogger("wanx.exporter")
_NAMED = 4  # kinds of nodes without a kernel in one line


def free_key(root: Path, key: str) -> str:
    """The key, numbered where engines are there: what a reader may have open is never replaced."""
    numbered = itertools.chain([key], (f"{key}-{number}" for number in itertools.count(2)))
    return next(name for name in numbered if not os.path.lexists(root / "engines" / name))


def _folder_of(manifest: Manifest, target: str, key: str) -> str | None:
    """Name of the folder that has a target's graphs of a key, which may be numbered."""
    engines = [component.engines.get(target, "") for component in manifest.components.values()]
    folders = {PurePosixPath(engine).parent for engine in engines}
    name = folders.pop().name
    is_there = not folders and re.fullmatch(rf"{re.escape(key)}(-\d+)?", name)
    return name if is_there and all(engine in manifest.files for engine in engines) else None


def _recorded(written: Path, folder: Path) -> dict[str, FileRecord]:
    """Records of the new graphs alone: the rest of a bundle has its own."""
    prefix = written.relative_to(folder).as_posix()
    return {f"{prefix}/{name}": record for name, record in record_files(written).items()}


def with_variants(
    root: Path,
    manifest: Manifest,
    target: Target,
    folder: Path,
    progress: Progress = no_progress,
    *,
    cache: GraphCache,
    force: bool = False,
) -> Manifest:
    """Write a target's graphs of all components; they read the bundle's own weights.

    Args:
        root: of the bundle.
        manifest: of the bundle.
        target: such as ``openvino``; it has graphs of its own.
        folder: where ``engines/<key>`` is written, unless the bundle has it already.
        progress: told how many graphs are written.
        cache: of traced graphs.
        force: write graphs that are there too.

    Returns:
        The manifest of the bundle with them; graphs of the target that they replace are left out.

    Raises:
        WanxError: there are nodes without a kernel, and ``WANX_STRICT=1``.
    """
    assert target.graph is not None
    graphs: dict[str, bytes] = {}
    for number, name in enumerate(manifest.components):
        progress(f"build {target.name}", number, len(manifest.components), "steps")
        graphs[name] = graph_bytes(target.graph(root, manifest, name, cache))
    digest = hashlib.sha256(b"".join(hashlib.sha256(data).digest() for data in graphs.values()))
    key = f"{target.name}-{digest.hexdigest()[:12]}"
    there = None if force else _folder_of(manifest, target.name, key)
    written = folder / "engines" / (there or free_key(root, key))
    if there is None:
        written.mkdir(parents=True)
        for name, data in graphs.items():
            (written / f"{name}.onnx").write_bytes(data)
    key = written.name
    for name in graphs:
        graph_file = (written if there is None else root / "engines" / key) / f"{name}.onnx"
        _report_missing(target, name, graph_file)
    progress(f"build {target.name}", len(graphs), len(graphs), "steps")
    replaced = {
        component.engines[target.name]
        for component in manifest.components.values()
        if target.name in component.engines
    }
    files = {path: record for path, record in manifest.files.items() if path not in replaced}
    recorded = manifest.files | ({} if there else _recorded(written, folder))
    own = {path: r for path, r in recorded.items() if path.startswith(f"engines/{key}/")}
    components = {
        name: component.model_copy(
            update={"engines": component.engines | {target.name: f"engines/{key}/{name}.onnx"}}
        )
        for name, component in manifest.components.items()
    }
    return manifest.model_copy(
        update={"components": components, "files": dict(sorted((files | own).items()))}
    )


def _report_missing(target: Target, component: str, graph: Path) -> None:
    """Say which nodes of a graph the target has no kernel for."""
    missing = target.missing_kernels(graph)
    if not missing:
        return
    more = f", and {len(missing) - _NAMED} more kinds" if len(missing) > _NAMED else ""
    line = (
        f"{target.name} has no kernel for nodes of {component}: "
        f"{'; '.join(str(kind) for kind in missing[:_NAMED])}{more}"
    )
    if os.environ.get("WANX_STRICT") == "1":
        raise WanxError(f"{line}; leave WANX_STRICT=1 out to build it all the same")
    _log.warning("%s; ONNX Runtime leaves them to the processor, if that has one", line)
