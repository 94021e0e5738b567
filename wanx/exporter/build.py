"""Engines for a target, built from a bundle alone and added to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import torch

from wanx.bundle.engine_schedule import PLAN
from wanx.bundle.manifest import Manifest
from wanx.bundle.publish import add_engines, record_files
from wanx.bundle.reader import Bundle, open_bundle
from wanx.bundle.trust import mark_trusted
from wanx.errors import UsageError
from wanx.exporter.components import ComponentSpec, component_specs
from wanx.exporter.engine_key import engine_key
from wanx.exporter.quantization.quantized_spec import quantized_spec
from wanx.exporter.quantization.recipe import recipe_from_manifest
from wanx.exporter.targets import aoti
from wanx.exporter.targets.tensorrt import flavour
from wanx.exporter.targets.tensorrt import target as tensorrt_target
from wanx.exporter.targets.tensorrt.ranges import ranges
from wanx.exporter.targets.tensorrt.tuning import BY_ITSELF, Tuning
from wanx.files.safetensors import read_header
from wanx.progress import Progress, no_progress
from wanx.version import __version__

TARGETS = ("cpu", "aoti", "rtx", "tensorrt")
# Of a component, the type that it computes in, the folder of its engines, and what is told how much
# is done, from 0 to 1.
Tell = Callable[[float], None]
Build = Callable[[ComponentSpec, torch.dtype, Path, Tell], object]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What TensorRT engines are to cover and to hold.

    Attributes:
        plugins: see :func:`wanx.exporter.targets.tensorrt.flavour.parse_plugins`.
        sizes: see :func:`wanx.exporter.targets.tensorrt.ranges.ranges`.
        frames: likewise.
        tuning: of the builder.
    """

    plugins: str = "auto"
    sizes: tuple[tuple[int, int], ...] = ()
    frames: int | None = None
    tuning: Tuning = BY_ITSELF


def require_target(target: str) -> None:
    """Refuse a target that there is not.

    Raises:
        UsageError: names those that there are.
    """
    if target not in TARGETS and flavour.parse_target(target) is None:
        raise UsageError(f"--target {target} is not available; choose {', '.join(TARGETS)}")


def build(
    bundle: Bundle,
    target: str,
    progress: Progress = no_progress,
    options: EngineOptions | None = None,
) -> Bundle:
    """Make ``target`` what runs a bundle; build its engines unless they are there.

    Raises:
        UsageError: there is no such target, or its GPU lacks the precision.
        WanxError: the engines cannot be built, or the place cannot be written.
    """
    require_target(target)
    with add_engines(bundle.root) as (folder, commit):
        manifest = with_engines(bundle.root, bundle.manifest, target, folder, progress, options)
        commit(manifest)
    return open_bundle(bundle.root, verify="size")


def with_engines(
    root: Path,
    manifest: Manifest,
    target: str,
    folder: Path,
    progress: Progress = no_progress,
    options: EngineOptions | None = None,
) -> Manifest:
    """Write what a target needs beyond the portable graphs.

    Args:
        root: of the bundle.
        manifest: of the bundle without the engines.
        target: what will run it.
        folder: where ``engines/<key>`` is made, unless the bundle has it already.
        progress: told how many components are built.
        options: for TensorRT; None leaves all as it is by default.

    Returns:
        The manifest of the bundle with them; engines of the target that they replace are left out.

    Raises:
        UsageError: the target's GPU lacks the precision.
        WanxError: the engines cannot be built.
    """
    kind = target.partition(":")[0]
    if target == aoti.TARGET:
        device = aoti.device_name()

        def builder(spec: ComponentSpec, dtype: torch.dtype, place: Path, tell: Tell) -> object:
            return aoti.build(spec, dtype, place)

        types = aoti.compute_type
        compiler = aoti.compiler()
    elif gpus := flavour.parse_target(target):
        flavour.require_precision(gpus, manifest.precision)
        gpus = flavour.for_this_machine(gpus)
        device = gpus.device
        recipe = manifest.components["dit"].quantization
        fp8 = recipe is not None and recipe.attention == "fp8"
        options = options or EngineOptions()
        covered = ranges(
            manifest.config, fp8_attention=fp8, sizes=options.sizes, frames=options.frames
        )
        types = flavour.compute_type
        wanted = flavour.parse_plugins(options.plugins)
        flavour.require_plugins(gpus, wanted)
        tuning = options.tuning
        words = [gpus.compiler(), *wanted, repr(sorted(covered.items())), str(tuning)]
        compiler = " ".join(filter(None, words))

        def builder(spec: ComponentSpec, dtype: torch.dtype, place: Path, tell: Tell) -> object:
            return tensorrt_target.build(spec, dtype, gpus, covered, place, wanted, tuning, tell)

    else:
        return manifest.model_copy(update={"target": kind})
    specs = {
        spec.name: (
            as_stored(spec, root, manifest),
            types(spec.weights, manifest.components[spec.name]),
        )
        for spec in component_specs(manifest.config)
    }
    key = engine_key(specs, kind, device, __version__, compiler)
    engines = {name: f"engines/{key}/{name}/{PLAN}" for name in specs}
    if any(c.engines.get(kind) != engines[n] for n, c in manifest.components.items()):
        for name, (spec, dtype) in specs.items():
            progress(f"build {name}", 0, 100, "steps")
            place = folder / "engines" / key / name
            builder(spec, dtype, place, partial(_percent, progress, f"build {name}"))
            progress(f"build {name}", 100, 100, "steps")
        manifest = _listing(manifest, kind, engines, folder)
    return manifest.model_copy(update={"target": kind})


def _percent(progress: Progress, stage: str, done: float) -> None:
    progress(stage, int(100 * done), 100, "steps")


def _listing(manifest: Manifest, kind: str, engines: dict[str, str], folder: Path) -> Manifest:
    """The manifest with new engines in the place of those of the same kind."""
    replaced = {
        PurePosixPath(component.engines[kind]).parent
        for component in manifest.components.values()
        if kind in component.engines
    }
    kept = {p: r for p, r in manifest.files.items() if PurePosixPath(p).parent not in replaced}
    folders = {PurePosixPath(path).parent for path in engines.values()}
    made = {p: r for p, r in record_files(folder).items() if PurePosixPath(p).parent in folders}
    files = dict(sorted((kept | made).items()))
    for path in engines.values():
        mark_trusted(path, files)
    components = {
        name: component.model_copy(update={"engines": component.engines | {kind: engines[name]}})
        for name, component in manifest.components.items()
    }
    return manifest.model_copy(update={"components": components, "files": files})


def as_stored(spec: ComponentSpec, root: Path, manifest: Manifest) -> ComponentSpec:
    """The component with the 8-bit layers that a bundle has it with."""
    component = manifest.components[spec.name]
    if component.quantization is None:
        return spec
    stored: dict[str, tuple[int, ...]] = {}
    for file in component.weights:
        stored |= {name: ref.shape for name, ref in read_header(root / file).entries.items()}
    return quantized_spec(spec, recipe_from_manifest(component.quantization, stored))
