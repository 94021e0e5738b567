"""Engines for a target, built from a bundle alone and added to it."""

from __future__ import annotations

import logging
import re
from functools import partial
from pathlib import Path, PurePosixPath

from wanx.bundle.engine_schedule import SCHEDULE
from wanx.bundle.manifest import Manifest
from wanx.bundle.publish import add_engines, record_files
from wanx.bundle.reader import Bundle, open_bundle, read_bundle
from wanx.bundle.trust import TRUST_VARIABLE, is_trusted, mark_trusted
from wanx.errors import WanxError
from wanx.exporter.graph.cache import GraphCache
from wanx.exporter.graph_variants import free_key, with_variants
from wanx.exporter.packages import require_packages
from wanx.exporter.targets.base import Target
from wanx.exporter.targets.options import DEFAULT_OPTIONS, BuilderOptions
from wanx.exporter.targets.registry import parse_target
from wanx.progress import Progress, no_progress
from wanx.runtime.vae.parts import require_parts
from wanx.version import __version__

_log = logging.getLogger("wanx.exporter")


def build(
    bundle: Bundle,
    target: str,
    progress: Progress = no_progress,
    options: BuilderOptions = DEFAULT_OPTIONS,
    *,
    force: bool = False,
) -> Bundle:
    """Make ``target`` the one that runs a bundle; build its engines unless they are there.

    Engines that were built elsewhere, or all with ``force``, are built anew.

    Raises:
        UsageError: there is no such target, its GPU lacks the precision, or an earlier version of
            wanx wrote the bundle.
        WanxError: the engines cannot be built, or the bundle cannot be written.
    """
    parsed = parse_target(target)
    require_parts(bundle.root, bundle.manifest)
    with add_engines(bundle) as (folder, commit):
        if read_bundle(bundle.root).hash != bundle.hash:
            raise WanxError(f"{bundle.root} was changed by another command: run this one again")
        manifest = with_engines(
            bundle.root, bundle.manifest, parsed, folder, progress, options, force=force
        )
        commit(manifest)
    return open_bundle(bundle.root, verify="size")


def with_engines(
    root: Path,
    manifest: Manifest,
    target: Target,
    folder: Path,
    progress: Progress = no_progress,
    options: BuilderOptions = DEFAULT_OPTIONS,
    *,
    force: bool = False,
) -> Manifest:
    """Write what a target needs beyond the portable graphs.

    Args:
        root: of the bundle.
        manifest: of the bundle without the engines.
        target: what will run it.
        folder: where ``engines/<key>`` is written, unless the bundle has it already.
        progress: told how many components are built.
        options: of the builder.
        force: build engines that are there too.

    Returns:
        The manifest of the bundle with them; engines of the target that they replace are left out.

    Raises:
        UsageError: the target's GPU lacks the precision.
        WanxError: the engines cannot be built.
    """
    builder = target.prepare(manifest, options)
    if target.graph is not None:
        cache = GraphCache(use=options.graph_cache)
        manifest = with_variants(root, manifest, target, folder, progress, cache=cache, force=force)
    if builder is None:
        return manifest.model_copy(update={"target": target.name})
    require_packages("build engines")
    from wanx.exporter.components import component_specs
    from wanx.exporter.engine_key import engine_key
    from wanx.exporter.partition.partition import partition
    from wanx.exporter.quantization.quantized_spec import quantized_like_bundle

    partitions = {
        spec.name: partition(
            quantized_like_bundle(spec, root, manifest),
            builder.compute_dtype(spec.weights, manifest.components[spec.name]),
        )
        for spec in component_specs(manifest.config)
    }
    key = engine_key(partitions, target.name, builder.device, __version__, builder.fingerprint)
    if force or not _has_engines(manifest, target.name, key):
        key = free_key(root, key)
        engines = {name: f"engines/{key}/{name}/{SCHEDULE}" for name in partitions}
        for name, parts in partitions.items():
            stage = f"build {name}"
            progress(stage, 0, 100, "steps")
            on_fraction = partial(_percent, progress, stage)
            builder.build(name, parts, folder / "engines" / key / name, on_fraction)
            progress(stage, 100, 100, "steps")
        for note in builder.notes():
            _log.warning(note)
        manifest = _manifest_with_engines(manifest, target.name, engines, folder)
    return manifest.model_copy(update={"target": target.name})


def _has_engines(manifest: Manifest, target: str, key: str) -> bool:
    """True if a bundle has all engines of a target under a key, and they were built here."""
    engines = [component.engines.get(target) for component in manifest.components.values()]
    return all(
        engine is not None
        and re.fullmatch(rf"{re.escape(key)}(-\d+)?", PurePosixPath(engine).parts[1])
        and is_trusted(engine, manifest.files)
        for engine in engines
    )


def _percent(progress: Progress, stage: str, done: float) -> None:
    progress(stage, int(100 * done), 100, "steps")


def _manifest_with_engines(
    manifest: Manifest, target: str, engines: dict[str, str], folder: Path
) -> Manifest:
    """Replace a manifest's engines of a target by new ones."""
    replaced = {
        PurePosixPath(component.engines[target]).parent
        for component in manifest.components.values()
        if target in component.engines
    }
    others = {p: r for p, r in manifest.files.items() if PurePosixPath(p).parent not in replaced}
    folders = {PurePosixPath(path).parent for path in engines.values()}
    built = {p: r for p, r in record_files(folder).items() if PurePosixPath(p).parent in folders}
    files = dict(sorted((others | built).items()))
    remembered = [mark_trusted(path, files) for path in engines.values()]
    if not all(remembered):
        _log.warning(
            "the cache folder cannot be written, so nothing remembers that these engines were "
            "built here: run them with %s=1",
            TRUST_VARIABLE,
        )
    components = {
        name: component.model_copy(update={"engines": component.engines | {target: engines[name]}})
        for name, component in manifest.components.items()
    }
    return manifest.model_copy(update={"components": components, "files": files})
