"""Export a checkpoint to a bundle."""

from __future__ import annotations

import platform
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir

import wanx
from wanx.bundle import Bundle, open_bundle
from wanx.errors import CancelledError, WanxError
from wanx.export.attach import attach
from wanx.export.components import ComponentSpec, component_specs, expected_tensors
from wanx.export.estimate import Estimate, estimate
from wanx.export.options import ExportOptions, ResolvedExport, resolve
from wanx.export.source import open_source
from wanx.export.targets import onnxruntime
from wanx.export.trace import trace
from wanx.export.weights import WrittenWeights, combined_sha256, write_weights
from wanx.manifest import TOKENIZER, Component, Manifest, Provenance
from wanx.models.tokenizer_file import write_tokenizer
from wanx.progress import Progress, byte_counter, silent
from wanx.publish import record_files, staging, write_manifest

TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "safetensors", "numpy")


def plan(options: ExportOptions) -> tuple[ResolvedExport, Estimate]:
    """Check a checkpoint against the network it claims to be, and estimate its export.

    Raises:
        WanxError: the checkpoint cannot be exported as asked.
    """
    resolved = resolve(options, open_source(options.source, options.task))
    check(resolved)
    return resolved, estimate(resolved)


def export(options: ExportOptions, progress: Progress = silent) -> Bundle:
    """Write a bundle and open it.

    Raises:
        WanxError: the checkpoint, the options or the disk do not allow it.
    """
    resolved, _ = plan(options)
    return write_bundle(resolved, options.target, force=options.force, progress=progress)


def check(resolved: ResolvedExport) -> None:
    """Compare the names and shapes of a checkpoint's tensors with those of its networks.

    Raises:
        CorruptInputError: lists every tensor that is missing, unexpected or misshaped.
    """
    for group, shapes in expected_tensors(resolved.checkpoint.config).items():
        resolved.checkpoint.components[group].check(shapes)


def write_bundle(
    resolved: ResolvedExport, target: str, *, force: bool = False, progress: Progress = silent
) -> Bundle:
    """Write the bundle of a checked export and open it.

    It appears at its place only when it is complete. Memory stays that of the graph: weights pass
    through in chunks.

    Raises:
        WanxError: the weights or the disk do not allow it.
    """
    needed = estimate(resolved).bundle_bytes
    with staging(resolved.output, force=force, needed_bytes=needed) as folder:
        _build(resolved, folder, target, progress)
    # Every file was hashed while it was written; the first run reads them back from the disk.
    return open_bundle(resolved.output, verify="size")


def _build(resolved: ResolvedExport, folder: Path, target: str, progress: Progress) -> None:
    for name in ("graphs", "weights", "tokenizer"):
        (folder / name).mkdir()
    written, traced = _write_and_trace(resolved, folder, progress)
    components = {
        spec.name: _write_graphs(spec, model, written[spec.weights], folder)
        for spec, model in traced
    }
    write_tokenizer(resolved.checkpoint.tokenizer, folder / TOKENIZER)
    known = {
        path.relative_to(folder).as_posix(): digest
        for done in written.values()
        for path, digest in done.sha256.items()
    }
    sources = {
        f"{group}/{name}": digest
        for group, done in written.items()
        for name, digest in done.source_sha256.items()
    }
    write_manifest(
        folder,
        Manifest(
            wanx_version=wanx.__version__,
            config=resolved.checkpoint.config,
            precision=resolved.precision,
            target=target,
            components=components,
            provenance=Provenance(
                source=resolved.checkpoint.source.name,
                source_layout=resolved.checkpoint.layout,
                source_sha256=combined_sha256(sources),
                tools={"python": platform.python_version()} | {t: version(t) for t in TOOLS},
                created=datetime.now(UTC),
            ),
            files=record_files(folder, known=known),
        ),
    )


def _write_and_trace(
    resolved: ResolvedExport, folder: Path, progress: Progress
) -> tuple[dict[str, WrittenWeights], list[tuple[ComponentSpec, ir.Model]]]:
    """Write the weights in a thread, which waits for the disk, while this one traces."""
    stop = threading.Event()
    specs = component_specs(resolved.checkpoint.config)
    traced = []
    with _prompt_switching(), ThreadPoolExecutor(max_workers=1) as writer:
        writing = writer.submit(_write_groups, resolved, folder / "weights", progress, stop)
        try:
            for number, spec in enumerate(specs):
                progress("trace graphs", number, len(specs), "steps")
                if writing.done():
                    writing.result()
                traced.append((spec, _trace(spec)))
            progress("trace graphs", len(specs), len(specs), "steps")
            return writing.result(), traced
        except BaseException:
            stop.set()
            raise


@contextmanager
def _prompt_switching() -> Iterator[None]:
    """Let the writer have the interpreter when its disk is ready, not 5 ms of tracing later."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(2e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _write_groups(
    resolved: ResolvedExport, folder: Path, progress: Progress, stop: threading.Event
) -> dict[str, WrittenWeights]:
    written = {}
    for group in resolved.checkpoint.components:
        count = byte_counter(progress, f"write {group}", resolved.weight_bytes(group))

        def on_bytes(portion: int, count: Callable[[int], None] = count) -> None:
            if stop.is_set():
                raise CancelledError("the export was stopped; nothing was left behind")
            count(portion)

        written[group] = write_weights(resolved, group, folder, on_bytes)
    return written


def _trace(spec: ComponentSpec) -> ir.Model:
    try:
        return trace(spec)
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
    """Whether memory ran out at the bottom of an error, which the exporter wraps in its own."""
    while error is not None:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _write_graphs(
    spec: ComponentSpec, model: ir.Model, weights: WrittenWeights, folder: Path
) -> Component:
    """Write the portable graph of a component and the variants of it that targets run faster."""
    storage = attach(model, weights.tensors, folder)
    save_graph(model, folder / "graphs" / f"{spec.name}.onnx")
    nodes = len(model.graph)
    engines = {}
    if onnxruntime.specialise(model):
        path = folder / "engines" / onnxruntime.ENGINE / f"{spec.name}.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_graph(model, path)
        engines["cpu"] = path.relative_to(folder).as_posix()
    return Component(
        graph=f"graphs/{spec.name}.onnx",
        engines=engines,
        weights=tuple(path.relative_to(folder).as_posix() for path in weights.sha256),
        storage=storage,
        nodes=nodes,
        inputs=tuple(item.name for item in (*spec.inputs, *spec.caches)),
        outputs=spec.outputs,
    )


def save_graph(model: ir.Model, path: Path) -> None:
    """Serialise a model whose large tensors are external; the same model gives the same bytes."""
    path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
