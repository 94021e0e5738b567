"""Engines for a target, built from a bundle alone and added to it."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import wanx
from wanx.bundle import Bundle, open_bundle
from wanx.engine_plan import PLAN
from wanx.errors import UsageError
from wanx.export.components import ComponentSpec, component_specs
from wanx.export.options import TARGETS
from wanx.export.quantized_spec import quantized_spec
from wanx.export.recipe import recorded_recipe
from wanx.export.targets import aoti
from wanx.manifest import Manifest
from wanx.progress import Progress, silent
from wanx.publish import extending, record_files
from wanx.safetensors_file import read_header
from wanx.trust import note_built


def build(bundle: Bundle, target: str, progress: Progress = silent) -> Bundle:
    """Make ``target`` what runs a bundle; build its engines unless they are there.

    Raises:
        UsageError: there is no such target.
        WanxError: as :func:`wanx.export.targets.aoti.build`, or the place cannot be written.
    """
    if target not in TARGETS:
        raise UsageError(f"--target {target} is not available; choose {', '.join(TARGETS)}")
    with extending(bundle.root) as (folder, commit):
        commit(with_engines(bundle.root, bundle.manifest, target, folder, progress))
    return open_bundle(bundle.root, verify="size")


def with_engines(
    root: Path, manifest: Manifest, target: str, folder: Path, progress: Progress = silent
) -> Manifest:
    """Write what a target needs beyond the portable graphs.

    Args:
        root: of the bundle.
        manifest: of the bundle without the engines.
        target: what will run it.
        folder: where ``engines/<key>`` is made, unless the bundle has it already.
        progress: told how many programs are compiled.

    Returns:
        The manifest of the bundle with them; engines of the target that they replace are left out.
    """
    if target == aoti.TARGET:
        manifest = _with_packages(root, manifest, folder, progress)
    return manifest.model_copy(update={"target": target})


def _with_packages(root: Path, manifest: Manifest, folder: Path, progress: Progress) -> Manifest:
    specs = {
        spec.name: (
            _as_stored(spec, root, manifest),
            aoti.compute_type(spec.weights, manifest.components[spec.name]),
        )
        for spec in component_specs(manifest.config)
    }
    key = aoti.engine_key(specs, wanx.__version__)
    engines = {name: f"engines/{key}/{name}/{PLAN}" for name in specs}
    if all(c.engines.get(aoti.TARGET) == engines[n] for n, c in manifest.components.items()):
        return manifest
    for number, (name, (spec, dtype)) in enumerate(specs.items()):
        progress("compile", number, len(specs), "steps")
        aoti.build(spec, dtype, folder / "engines" / key / name)
    progress("compile", len(specs), len(specs), "steps")
    replaced = {
        PurePosixPath(component.engines[aoti.TARGET]).parent
        for component in manifest.components.values()
        if aoti.TARGET in component.engines
    }
    kept = {p: r for p, r in manifest.files.items() if PurePosixPath(p).parent not in replaced}
    made = {p: r for p, r in record_files(folder).items() if p.startswith(f"engines/{key}/")}
    files = dict(sorted((kept | made).items()))
    for path in engines.values():
        note_built(path, files)
    components = {
        name: component.model_copy(
            update={"engines": component.engines | {aoti.TARGET: engines[name]}}
        )
        for name, component in manifest.components.items()
    }
    return manifest.model_copy(update={"components": components, "files": files})


def _as_stored(spec: ComponentSpec, root: Path, manifest: Manifest) -> ComponentSpec:
    component = manifest.components[spec.name]
    if component.quantization is None:
        return spec
    stored: dict[str, tuple[int, ...]] = {}
    for file in component.weights:
        stored |= {name: ref.shape for name, ref in read_header(root / file).entries.items()}
    return quantized_spec(spec, recorded_recipe(component.quantization, stored))
