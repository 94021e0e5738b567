"""Export a checkpoint to a bundle."""

from __future__ import annotations

import hashlib
import logging
import platform
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from wanx.accuracy.gates import Gates
from wanx.accuracy.golden_check import check_golden, require_golden
from wanx.accuracy.golden_tokens import write_golden_tokens
from wanx.bundle.golden_steps import GOLDEN, write_golden
from wanx.bundle.manifest import TOKENIZER, Component, Manifest, Provenance
from wanx.bundle.publish import publish_bundle, record_files, refuse_existing, write_manifest
from wanx.bundle.reader import Bundle, open_bundle
from wanx.bundle.recovery import absolute
from wanx.checkpoints.checkpoint import Checkpoint
from wanx.checkpoints.lora.fuse import parse_loras
from wanx.checkpoints.tokenizer_source import write_tokenizer
from wanx.config.models import ModelConfig
from wanx.config.presets import suggest_preset
from wanx.errors import CancelledError
from wanx.exporter.build import with_engines
from wanx.exporter.calibration.step_table import measure_step_table, store_step_table
from wanx.exporter.component_groups import component_groups, weight_groups
from wanx.exporter.component_writer import verified_component, write_graphs
from wanx.exporter.estimate import Estimate, estimate
from wanx.exporter.golden import source_golden
from wanx.exporter.graph.cache import GraphCache, Tensors
from wanx.exporter.hub_source import HubSource
from wanx.exporter.options import ExportOptions, ResolvedExport, resolve
from wanx.exporter.packages import require_packages
from wanx.exporter.source import open_source
from wanx.exporter.targets.base import Target
from wanx.exporter.targets.options import BuilderOptions
from wanx.exporter.targets.registry import parse_target
from wanx.exporter.thread_settings import one_thread, short_switch_interval
from wanx.exporter.weights import WrittenWeights, combined_sha256, file_labels, write_weights
from wanx.files.hub_cache import hub_name
from wanx.interruption import cleanup_on_sigint, result_of
from wanx.progress import Progress, byte_counter, no_progress
from wanx.runtime.sessions.onnxruntime.providers import PROVIDERS
from wanx.version import __version__

if TYPE_CHECKING:
    from wanx.exporter.quantization.recipe import Recipe

_log = logging.getLogger("wanx.exporter")
TOOLS = (
    "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "safetensors", "tokenizers", "numpy",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """A checked export.

    Attributes:
        resolved: the export with nothing left open.
        estimate: sizes, memory and time that it takes.
        hub: files that are on the hub; those that are not in its cache have still to come.
    """

    resolved: ResolvedExport
    estimate: Estimate
    hub: HubSource | None = None


def plan(
    options: ExportOptions,
    checkpoint: Checkpoint | None = None,
    progress: Progress = no_progress,
) -> ExportPlan:
    """Check a checkpoint against the network it claims to be, and estimate its export.

    Of what is on the hub and not in its cache, configs and headers of weights are read there.

    Args:
        options: of the export.
        checkpoint: exported instead of the source that the options name.
        progress: told how much is read.

    Raises:
        WanxError: the checkpoint cannot be exported as asked.
    """
    if checkpoint is not None:
        return _plan(options, checkpoint)
    hub = HubSource(options)
    with cleanup_on_sigint(hub.remove_headers), hub.names_in_errors():
        planned = _plan(hub.headers(progress))
    return replace(planned, hub=hub if hub.files else None)


def _plan(options: ExportOptions, checkpoint: Checkpoint | None = None) -> ExportPlan:
    """Plan an export of local files."""
    checkpoint = checkpoint or open_source(
        options.source, options.task, options.parts, parse_loras(options.loras),
        full_precision=options.precision == "fp32",
    )  # fmt: skip
    cache = GraphCache(use=options.graph_cache)
    # First, because "auto" follows the types that the tensors are stored in.
    check(checkpoint, cache)
    resolved = resolve(options, checkpoint)
    _suggest_preset(options, checkpoint)
    return ExportPlan(resolved=resolved, estimate=estimate(resolved, cache))


def _suggest_preset(options: ExportOptions, checkpoint: Checkpoint) -> None:
    """Say in one line where the weights look distilled and no preset was named."""
    if options.preset is not None or checkpoint.config.defaults.preset is not None:
        return
    names = [
        *(lora.file for lora in checkpoint.loras),
        *(file.name for file in checkpoint.components["dit"].files),
        checkpoint.source.name,
    ]
    if found := suggest_preset(names, checkpoint.config.task):
        name, preset = found
        _log.info(
            "%s looks distilled to few steps: --preset %s makes those the bundle's own",
            name, preset.name,
        )  # fmt: skip


def export(options: ExportOptions, progress: Progress = no_progress) -> Bundle:
    """Write a bundle and open it.

    Raises:
        WanxError: the checkpoint, the options or the disk do not allow it.
    """
    planned = plan(options, progress=progress)
    if planned.hub is not None:
        hub, output = planned.hub, planned.resolved.output
        refuse_existing(absolute(output), options.force)
        hub.require_space(output, planned.estimate.bundle_bytes)
        hub.remove_headers()
        planned = _plan(hub.download(progress))
    return write_bundle(planned, progress)


def check(checkpoint: Checkpoint, cache: GraphCache | None = None) -> None:
    """Compare the names, shapes and types of a checkpoint's tensors with those of its networks.

    Args:
        checkpoint: to compare.
        cache: knows the tensors of networks; None takes the usual one.

    Raises:
        CorruptInputError: lists every tensor that is missing, unexpected, misshaped or of a type
            that is not read.
    """
    config, cache = checkpoint.config, cache or GraphCache()
    for group in weight_groups(config):
        checkpoint.components[group].check(
            cache.tensors(group, config, partial(_tensors_of, group, config))
        )


def _tensors_of(group: str, config: ModelConfig) -> Tensors:
    require_packages(f"list the tensors of {group}, a network of sizes that wanx does not know")
    from wanx.exporter.components import expected_tensors

    return expected_tensors(config)[group]


def write_bundle(planned: ExportPlan, progress: Progress = no_progress) -> Bundle:
    """Write the bundle of a checked export and open it.

    It appears at its place only when it is complete. Memory stays that of the graph, or of one
    block where there is something to calibrate: weights pass through in chunks.

    Raises:
        GateError: the bundle is not accurate enough, and the gate was asked for.
        WanxError: the weights or the disk do not allow it.
    """
    resolved, needed = planned.resolved, planned.estimate.bundle_bytes
    with publish_bundle(
        resolved.output, force=resolved.options.force, needed_bytes=needed
    ) as folder:
        _build(resolved, folder, progress)
    # Every file was hashed while it was written; the first run reads them back from the disk.
    return open_bundle(resolved.output, verify="size")


def _build(resolved: ResolvedExport, folder: Path, progress: Progress) -> None:
    options, checkpoint = resolved.options, resolved.checkpoint
    build = _Build(resolved, folder, progress)
    groups = component_groups(checkpoint.config)
    recipes = {}
    if "text_encoder" in resolved.eight_bit:
        from wanx.exporter.quantization.recipe import text_recipe

        recipes["text_encoder"] = text_recipe(checkpoint.config.text_encoder)
    golden = None
    if resolved.scheme is not None and "dit" in resolved.eight_bit:
        from wanx.exporter.quantization.choose_recipe import choose_recipe

        # The other components make the denoiser's inputs, which its scales depend on.
        build.add([name for name in groups if name != "dit"], recipes)
        recipes["dit"], golden = choose_recipe(
            checkpoint, build.bundle(), resolved.scheme, options.quantize, options.calibration,
            progress, resolved.runs,
        )  # fmt: skip
        build.add(["dit"], recipes)
    else:
        build.add(list(groups), recipes)
        if options.calibration.golden_steps:
            golden = source_golden(resolved, build.bundle(), progress)
    if golden is not None and options.calibration.golden_steps:
        write_golden(golden, folder / GOLDEN)
    plain = build.bundle()
    target = parse_target(options.target)
    building = BuilderOptions(graph_cache=options.graph_cache)
    manifest = with_engines(folder, plain.manifest, target, folder, progress, building)
    # Engines for a GPU that is not here cannot run; their numbers can, on the processor.
    if options.gate:
        built = replace(plain, manifest=manifest) if _runs_here(target) else plain
        require_golden(check_golden(built, progress=progress), Gates())
    if options.calibrate_cache:
        built = replace(plain, manifest=manifest) if _runs_here(target) else plain
        table = measure_step_table(built, options.calibration, progress)
        manifest = store_step_table(table, folder, manifest)
    write_manifest(folder, manifest)


def _runs_here(target: Target) -> bool:
    """True if this machine has what runs the target's engines."""
    if target.name in PROVIDERS and not PROVIDERS[target.name].is_installed:
        return False
    if not target.may_be_elsewhere:
        return True
    import torch

    return torch.cuda.is_available()


class _Build:
    """A bundle that grows by components in a folder."""

    def __init__(
        self,
        resolved: ResolvedExport,
        folder: Path,
        progress: Progress,
    ) -> None:
        self._resolved, self._folder, self._progress = resolved, folder, progress
        self._cache = GraphCache(use=resolved.options.graph_cache)
        self._groups = component_groups(resolved.checkpoint.config)
        self._components: dict[str, Component] = {}
        self._sha256: dict[str, str] = {}
        self._sources: dict[str, str] = {}
        for name in ("graphs", "weights", "tokenizer"):
            (folder / name).mkdir()
        write_tokenizer(resolved.checkpoint.tokenizer, folder / TOKENIZER)
        checkpoint = resolved.checkpoint
        write_golden_tokens(
            folder, checkpoint.config.text_encoder.vocab_size, checkpoint.tokenizer.path
        )

    def add(self, names: Sequence[str], recipes: Mapping[str, Recipe]) -> None:
        """Write the weights and the graphs of some components."""
        written, traced = self._write_and_trace(names, recipes)
        for group, done in written.items():
            self._sha256 |= {self._name(path): digest for path, digest in done.sha256.items()}
            labels = file_labels(done.source_sha256)
            self._sources |= {f"{group}/{labels[f]}": d for f, d in done.source_sha256.items()}
        for name, model in traced.items():
            group = self._groups[name]
            stride = self._resolved.checkpoint.config.vae.spatial_stride
            component = write_graphs(name, model, written[group], self._folder, stride)
            if (recipe := recipes.get(group)) is not None:
                from wanx.exporter.trace_component import component_spec

                spec = component_spec(name, self._resolved.checkpoint.config)
                component = verified_component(
                    spec, component, recipe, self._folder, written[group].kept
                )
            self._components[name] = component

    def bundle(self) -> Bundle:
        """Bundle of the components so far; it may lack some, and golden steps."""
        resolved, source = self._resolved, self._resolved.checkpoint.source
        manifest = Manifest(
            wanx_version=__version__,
            config=resolved.checkpoint.config,
            precision=resolved.precision,
            target="cpu",
            components={n: self._components[n] for n in self._groups if n in self._components},
            provenance=Provenance(
                source=hub_name(source) or source.name,
                source_layout=resolved.checkpoint.layout,
                source_sha256=combined_sha256(self._sources),
                tools={"python": platform.python_version()} | _versions(),
                created=datetime.now(UTC),
                loras=(*resolved.checkpoint.earlier_loras, *resolved.checkpoint.loras),
            ),
            files=record_files(self._folder, known=self._sha256),
        )
        return Bundle(self._folder, manifest, hashlib.sha256(manifest.to_json()).hexdigest())

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()

    def _write_and_trace(
        self, names: Sequence[str], recipes: Mapping[str, Recipe]
    ) -> tuple[dict[str, WrittenWeights], dict[str, ir.Model]]:
        """Write the weights in a thread, which waits for the disk, while this one traces."""
        stop = threading.Event()
        groups = list(dict.fromkeys(self._groups[name] for name in names))
        traced: dict[str, ir.Model] = {}
        with short_switch_interval(), ThreadPoolExecutor(max_workers=1) as writer:
            writing = writer.submit(self._write_groups, groups, recipes, stop)
            try:
                for name in names:
                    self._count_traced(len(traced))
                    if writing.done():
                        writing.result()
                    traced[name] = self._graph(name, recipes.get(self._groups[name]))
                self._count_traced(len(traced))
                return result_of(writing), traced
            except BaseException:
                stop.set()
                raise

    def _graph(self, name: str, recipe: Recipe | None) -> ir.Model:
        config = self._resolved.checkpoint.config

        def trace() -> ir.Model:
            require_packages(f"trace {name}, for which wanx has no graph")
            from wanx.exporter.trace_component import trace_component

            return trace_component(name, config, recipe)

        return self._cache.graph(name, config, recipe, trace)

    def _count_traced(self, here: int) -> None:
        count = len(self._components) + here
        self._progress("trace graphs", count, len(self._groups), "steps")

    def _write_groups(
        self, groups: list[str], recipes: Mapping[str, Recipe], stop: threading.Event
    ) -> dict[str, WrittenWeights]:
        written = {}
        with one_thread(quantizes=bool(recipes)):
            for group in groups:
                total = self._resolved.weight_bytes(group)
                count = byte_counter(self._progress, f"write {group}", total)

                def on_bytes(portion: int, count: Callable[[int], None] = count) -> None:
                    if stop.is_set():
                        raise CancelledError("the export was stopped; nothing was left behind")
                    count(portion)

                folder, recipe = self._folder / "weights", recipes.get(group)
                if recipe is None:
                    written[group] = write_weights(self._resolved, group, folder, on_bytes)
                else:
                    from wanx.exporter.quantized_weights import write_quantized_weights

                    written[group] = write_quantized_weights(
                        self._resolved, group, folder, on_bytes, recipe
                    )
        return written


def _versions() -> dict[str, str]:
    """Versions of the tools that are installed."""
    versions = {}
    for name in TOOLS:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
