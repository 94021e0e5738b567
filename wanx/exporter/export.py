"""Export a checkpoint to a bundle."""

from __future__ import annotations

import hashlib
import platform
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir
import torch

from wanx.accuracy.gates import Gates
from wanx.accuracy.golden_check import check_golden, require_golden
from wanx.accuracy.golden_tokens import write_golden_tokens
from wanx.bundle.golden_steps import GOLDEN, write_golden
from wanx.bundle.manifest import TOKENIZER, Component, Manifest, Provenance
from wanx.bundle.publish import publish_bundle, record_files, write_manifest
from wanx.bundle.reader import Bundle, open_bundle
from wanx.checkpoints.checkpoint import Checkpoint
from wanx.checkpoints.tokenizer_file import write_tokenizer
from wanx.errors import CancelledError, WanxError
from wanx.exporter.build import with_engines
from wanx.exporter.calibration.calibrate import record_golden
from wanx.exporter.component_writer import verified_component, write_graphs
from wanx.exporter.components import ComponentSpec, component_specs, expected_tensors
from wanx.exporter.estimate import Estimate, estimate
from wanx.exporter.graph.trace import trace
from wanx.exporter.options import ExportOptions, ResolvedExport, resolve
from wanx.exporter.quantization.choose_recipe import choose_recipe
from wanx.exporter.quantization.quantized_spec import quantized_spec
from wanx.exporter.quantization.recipe import Recipe, text_recipe
from wanx.exporter.source import open_source
from wanx.exporter.targets.registry import parse_target
from wanx.exporter.weights import WrittenWeights, combined_sha256, write_weights
from wanx.progress import Progress, byte_counter, no_progress
from wanx.version import __version__

TOOLS = (
    "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "safetensors", "tokenizers", "numpy",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """A checked export.

    Attributes:
        resolved: the export with nothing left open.
        estimate: sizes, memory and time that it takes.
    """

    resolved: ResolvedExport
    estimate: Estimate


def plan(options: ExportOptions, checkpoint: Checkpoint | None = None) -> ExportPlan:
    """Check a checkpoint against the network it claims to be, and estimate its export.

    Args:
        options: of the export.
        checkpoint: exported instead of the source that the options name.

    Raises:
        WanxError: the checkpoint cannot be exported as asked.
    """
    checkpoint = checkpoint or open_source(options.source, options.task)
    check(checkpoint)  # first, because "auto" follows the types that the tensors are stored in
    resolved = resolve(options, checkpoint)
    return ExportPlan(resolved=resolved, estimate=estimate(resolved))


def export(options: ExportOptions, progress: Progress = no_progress) -> Bundle:
    """Write a bundle and open it.

    Raises:
        WanxError: the checkpoint, the options or the disk do not allow it.
    """
    return write_bundle(plan(options), progress)


def check(checkpoint: Checkpoint) -> None:
    """Compare the names, shapes and types of a checkpoint's tensors with those of its networks.

    Raises:
        CorruptInputError: lists every tensor that is missing, unexpected, misshaped or of a type
            that is not read.
    """
    for group, shapes in expected_tensors(checkpoint.config).items():
        checkpoint.components[group].check(shapes)


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
    specs = component_specs(checkpoint.config)
    build = _Build(resolved, specs, folder, progress)
    recipes = {}
    if "text_encoder" in resolved.eight_bit:
        recipes["text_encoder"] = text_recipe(checkpoint.config.text_encoder)
    golden = None
    if resolved.scheme is not None and "dit" in resolved.eight_bit:
        # The other components make the denoiser's inputs, which its scales depend on.
        build.add([spec for spec in specs if spec.weights != "dit"], recipes)
        recipes["dit"], golden = choose_recipe(
            checkpoint, build.bundle(), resolved.scheme, options.quantize, options.calibration,
            progress, resolved.runs,
        )  # fmt: skip
        build.add([spec for spec in specs if spec.weights == "dit"], recipes)
    else:
        build.add(specs, recipes)
        if options.calibration.golden_steps:
            golden = record_golden(
                checkpoint, build.bundle(), options.calibration, progress, resolved.runs
            )
    if golden is not None and options.calibration.golden_steps:
        write_golden(golden, folder / GOLDEN)
    plain = build.bundle()
    target = parse_target(options.target)
    manifest = with_engines(folder, plain.manifest, target, specs, folder, progress)
    if options.gate:
        # Engines for a GPU that is not here cannot run; their numbers can, on the processor.
        runs = not target.may_be_elsewhere or torch.cuda.is_available()
        built = replace(plain, manifest=manifest) if runs else plain
        require_golden(check_golden(built, progress=progress), Gates())
    write_manifest(folder, manifest)


class _Build:
    """A bundle that grows by components in a folder."""

    def __init__(
        self,
        resolved: ResolvedExport,
        specs: Sequence[ComponentSpec],
        folder: Path,
        progress: Progress,
    ) -> None:
        self._resolved, self._folder, self._progress = resolved, folder, progress
        self._names = [spec.name for spec in specs]
        self._components: dict[str, Component] = {}
        self._sha256: dict[str, str] = {}
        self._sources: dict[str, str] = {}
        for name in ("graphs", "weights", "tokenizer"):
            (folder / name).mkdir()
        write_tokenizer(resolved.checkpoint.tokenizer, folder / TOKENIZER)
        checkpoint = resolved.checkpoint
        write_golden_tokens(folder, checkpoint.config.text_encoder.vocab_size, checkpoint.tokenizer)

    def add(self, specs: list[ComponentSpec], recipes: Mapping[str, Recipe]) -> None:
        """Write the weights and the graphs of some components."""
        written, traced = self._write_and_trace(specs, recipes)
        for group, done in written.items():
            self._sha256 |= {self._name(path): digest for path, digest in done.sha256.items()}
            self._sources |= {f"{group}/{name}": d for name, d in done.source_sha256.items()}
        for spec, model in traced:
            component = write_graphs(spec, model, written[spec.weights], self._folder)
            recipe = recipes.get(spec.weights)
            if recipe is not None:
                component = verified_component(spec, component, recipe, self._folder)
            self._components[spec.name] = component

    def bundle(self) -> Bundle:
        """Bundle of the components so far; it may lack some, and golden steps."""
        resolved = self._resolved
        manifest = Manifest(
            wanx_version=__version__,
            config=resolved.checkpoint.config,
            precision=resolved.precision,
            target="cpu",
            components={n: self._components[n] for n in self._names if n in self._components},
            provenance=Provenance(
                source=resolved.checkpoint.source.name,
                source_layout=resolved.checkpoint.layout,
                source_sha256=combined_sha256(self._sources),
                tools={"python": platform.python_version()} | {t: version(t) for t in TOOLS},
                created=datetime.now(UTC),
            ),
            files=record_files(self._folder, known=self._sha256),
        )
        return Bundle(self._folder, manifest, hashlib.sha256(manifest.to_json()).hexdigest())

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()

    def _write_and_trace(
        self, specs: list[ComponentSpec], recipes: Mapping[str, Recipe]
    ) -> tuple[dict[str, WrittenWeights], list[tuple[ComponentSpec, ir.Model]]]:
        """Write the weights in a thread, which waits for the disk, while this one traces."""
        stop = threading.Event()
        groups = list(dict.fromkeys(spec.weights for spec in specs))
        traced: list[tuple[ComponentSpec, ir.Model]] = []
        with _short_switch_interval(), ThreadPoolExecutor(max_workers=1) as writer:
            writing = writer.submit(self._write_groups, groups, recipes, stop)
            try:
                for spec in specs:
                    self._count_traced(len(traced))
                    if writing.done():
                        writing.result()
                    traced.append((spec, _trace(spec, recipes.get(spec.weights))))
                self._count_traced(len(traced))
                return writing.result(), traced
            except BaseException:
                stop.set()
                raise

    def _count_traced(self, here: int) -> None:
        count = len(self._components) + here
        self._progress("trace graphs", count, len(self._names), "steps")

    def _write_groups(
        self, groups: list[str], recipes: Mapping[str, Recipe], stop: threading.Event
    ) -> dict[str, WrittenWeights]:
        written = {}
        # In this thread alone. Pieces are small, and another core is tracing or hashing: threads
        # that wait for each other took several times as long.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for group in groups:
                total = self._resolved.weight_bytes(group)
                count = byte_counter(self._progress, f"write {group}", total)

                def on_bytes(portion: int, count: Callable[[int], None] = count) -> None:
                    if stop.is_set():
                        raise CancelledError("the export was stopped; nothing was left behind")
                    count(portion)

                written[group] = write_weights(
                    self._resolved, group, self._folder / "weights", on_bytes, recipes.get(group)
                )
        finally:
            torch.set_num_threads(threads)
        return written


@contextmanager
def _short_switch_interval() -> Iterator[None]:
    """Lower the GIL's switch interval, so that tracing does not starve the writer."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(2e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _trace(spec: ComponentSpec, recipe: Recipe | None) -> ir.Model:
    try:
        return trace(spec if recipe is None else quantized_spec(spec, recipe))
    except Exception as error:
        if _is_out_of_memory(error):
            raise WanxError(
                f"not enough memory to trace {spec.name}; "
                "`wanx export --dry-run` says how much it takes"
            ) from error
        raise WanxError(
            f"cannot trace {spec.name} ({type(error).__name__}); if there is memory left, report "
            "what WANX_DEBUG=1 shows"
        ) from error


def _is_out_of_memory(error: BaseException | None) -> bool:
    """True if memory ran out at the bottom of an error, which the exporter wraps in its own."""
    while error is not None:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
