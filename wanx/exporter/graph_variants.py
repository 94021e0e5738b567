"""Graphs that a target runs instead of the portable ones, rewritten from them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx_ir as ir

from wanx.bundle.manifest import Manifest
from wanx.bundle.publish import record_files
from wanx.exporter.component_writer import graph_bytes
from wanx.exporter.targets.base import Rewrite
from wanx.progress import Progress, no_progress


def with_variants(
    root: Path,
    manifest: Manifest,
    target: str,
    rewrite: Rewrite,
    folder: Path,
    progress: Progress = no_progress,
) -> Manifest:
    """Write a target's graphs of all components; they read the bundle's own weights.

    Args:
        root: of the bundle.
        manifest: of the bundle.
        target: such as ``openvino``.
        rewrite: makes the target's graph of a portable one, in place.
        folder: where ``engines/<key>`` is written, unless the bundle has it already.
        progress: told how many graphs are written.

    Returns:
        The manifest of the bundle with them; graphs of the target that they replace are left out.
    """
    graphs: dict[str, bytes] = {}
    for number, (name, component) in enumerate(manifest.components.items()):
        progress(f"build {target}", number, len(manifest.components), "steps")
        model = ir.load(root / component.graph)
        for value in model.graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value.base_dir = root
        rewrite(model)
        graphs[name] = graph_bytes(model)
    digest = hashlib.sha256(b"".join(hashlib.sha256(data).digest() for data in graphs.values()))
    key = f"{target}-{digest.hexdigest()[:12]}"
    written = folder / "engines" / key
    if not (root / "engines" / key).exists():
        written.mkdir(parents=True)
        for name, data in graphs.items():
            (written / f"{name}.onnx").write_bytes(data)
    progress(f"build {target}", len(graphs), len(graphs), "steps")
    replaced = {c.engines[target] for c in manifest.components.values() if target in c.engines}
    files = {path: record for path, record in manifest.files.items() if path not in replaced}
    known = manifest.files | record_files(folder)
    own = {path: r for path, r in known.items() if path.startswith(f"engines/{key}/")}
    components = {
        name: component.model_copy(
            update={"engines": component.engines | {target: f"engines/{key}/{name}.onnx"}}
        )
        for name, component in manifest.components.items()
    }
    return manifest.model_copy(
        update={"components": components, "files": dict(sorted((files | own).items()))}
    )
