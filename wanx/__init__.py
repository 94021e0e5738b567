"""wanx: the deployment compiler for the Wan2.1 video diffusion models.

>>> import wanx
>>> pipeline = wanx.load()                            # the built-in tiny model, or a bundle
>>> video = pipeline("a red circle moving right on a blue background", seed=0)
>>> video.frames.shape
(17, 64, 64, 3)
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanx.errors import (
    CancelledError,
    CorruptInputError,
    EnvironmentMismatchError,
    GateError,
    UsageError,
    WanxError,
)
from wanx.privacy import disable_telemetry
from wanx.progress import Progress, no_progress
from wanx.version import __version__

if TYPE_CHECKING:
    from wanx.accuracy.verification import Verification
    from wanx.benchmarks.accuracy.comparison import Comparison
    from wanx.benchmarks.speed.bench import Extras
    from wanx.benchmarks.speed.results import Results
    from wanx.benchmarks.speed.suite import BenchOptions
    from wanx.bundle.reader import Bundle
    from wanx.checkpoints.checkpoint import PartPaths
    from wanx.checkpoints.lora.fuse import Lora
    from wanx.config.models import Task
    from wanx.exporter.calibration.options import CalibrationOptions
    from wanx.exporter.export import ExportPlan
    from wanx.exporter.quantization.scheme import QuantizeOptions
    from wanx.runtime.pipeline import Pipeline

__all__ = [
    "CancelledError",
    "CorruptInputError",
    "EnvironmentMismatchError",
    "GateError",
    "Lora",
    "PartPaths",
    "UsageError",
    "WanxError",
    "__version__",
    "bench",
    "build",
    "compare",
    "export",
    "inspect",
    "load",
    "plan_export",
    "verify",
]

# Imported when they are asked for, since what they come from takes a while.
_LATER = {"Lora": "wanx.checkpoints.lora.fuse", "PartPaths": "wanx.checkpoints.checkpoint"}

# Here, since every module of wanx is imported after this one, in worker processes too.
disable_telemetry()


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load(
    bundle: str | Path | None = None,
    *,
    threads: int | None = None,
    vram_budget: int | None = None,
    memory: int | None = None,
    provider: str = "auto",
    fallback: bool = False,
    progress: Progress = no_progress,
) -> Pipeline:
    """Open a bundle to generate videos from.

    Args:
        bundle: folder made by :func:`export`, ``owner/name`` of one on the hub, or the name of a
            built-in one; None is ``tiny``.
        threads: threads of the processor; None takes all cores.
        vram_budget: most bytes of the GPU's memory to take, for engines of TensorRT; weights that
            do not fit are streamed. None takes what is free.
        memory: most bytes of the host's memory to take, weights included; where frames of the VAE
            do not fit they are computed in tiles, with the same result. None takes what is free.
        provider: of ONNX Runtime, such as ``openvino``; ``auto`` is the target's own, and of a
            bundle for the processor what was measured to be faster and is installed.
        fallback: go on on the processor where the provider fails.
        progress: told how much of a bundle on the hub has arrived.

    Raises:
        UsageError: a budget was given for a bundle that cannot keep to one, or there is no such
            provider.
        EnvironmentMismatchError: the provider is not installed, or does not start.
        WanxError: the bundle is missing, damaged or unsafe.
    """
    from wanx.builtin import open_named
    from wanx.runtime.pipeline import Pipeline

    return Pipeline(
        open_named(bundle or "tiny", progress),
        threads=threads,
        vram_budget=vram_budget,
        memory=memory,
        provider=provider,
        fallback=fallback,
    )


def export(
    source: str | Path | None = None,
    output: str | Path | None = None,
    *,
    revision: str | None = None,
    parts: PartPaths | None = None,
    loras: Sequence[Lora | str] = (),
    precision: str = "auto",
    target: str = "cpu",
    task: Task | None = None,
    force: bool = False,
    gate: bool = False,
    quantize: QuantizeOptions | None = None,
    calibration: CalibrationOptions | None = None,
    graph_cache: bool = True,
    preset: str | None = None,
    calibrate_cache: bool = False,
    progress: Progress = no_progress,
) -> Bundle:
    """Export a checkpoint to a bundle; see :class:`wanx.exporter.options.ExportOptions`.

    Raises:
        GateError: the bundle is not accurate enough, and ``gate`` was asked for.
        WanxError: the checkpoint, the options or the disk do not allow it.
    """
    from wanx.exporter.packages import GRAPHS, require_packages

    require_packages("export", GRAPHS)
    from wanx.checkpoints.checkpoint import NO_PARTS
    from wanx.exporter.calibration.options import CalibrationOptions
    from wanx.exporter.export import export as run_export
    from wanx.exporter.options import ExportOptions
    from wanx.exporter.quantization.scheme import QuantizeOptions

    options = ExportOptions(
        source=source,
        revision=revision,
        parts=parts or NO_PARTS,
        loras=tuple(loras),
        output=None if output is None else Path(output),
        precision=precision,
        target=target,
        task=task,
        force=force,
        gate=gate,
        quantize=quantize or QuantizeOptions(),
        calibration=calibration or CalibrationOptions(),
        graph_cache=graph_cache,
        preset=preset,
        calibrate_cache=calibrate_cache,
    )
    return run_export(options, progress)


def plan_export(
    source: str | Path | None = None,
    output: str | Path | None = None,
    *,
    progress: Progress = no_progress,
    **options: Any,
) -> ExportPlan:
    """Check a checkpoint and estimate its export, without writing anything.

    Of a checkpoint on the hub only configs and headers of weights are fetched.

    Args:
        source: as for :func:`export`.
        output: likewise.
        progress: told how much is fetched.
        options: likewise.

    Raises:
        WanxError: the checkpoint or the options do not allow it.
    """
    from wanx.exporter.packages import GRAPHS, require_packages

    require_packages("plan an export", GRAPHS)
    from wanx.exporter.export import plan
    from wanx.exporter.options import ExportOptions

    output = None if output is None else Path(output)
    return plan(ExportOptions(source=source, output=output, **options), progress=progress)


def inspect(bundle: str | Path) -> Bundle:
    """Read the manifest of a bundle, and check no other file.

    Args:
        bundle: folder made by :func:`export`, ``owner/name`` of one on the hub, of which the
            manifest alone is fetched, or the name of a built-in bundle.

    Raises:
        WanxError: there is no such bundle, or its manifest is damaged.
    """
    from wanx.builtin import find_bundle
    from wanx.bundle.reader import read_bundle

    return read_bundle(find_bundle(bundle, manifest_only=True))


def verify(
    bundle: str | Path,
    *,
    golden: bool = True,
    threads: int | None = None,
    progress: Progress = no_progress,
) -> Verification:
    """Hash every file of a bundle and run its golden steps.

    See :func:`wanx.accuracy.verification.verify`.

    Raises:
        WanxError: the manifest cannot be used.
    """
    from wanx.accuracy.verification import verify as run_verify

    return run_verify(bundle, golden=golden, threads=threads, progress=progress)


def build(
    bundle: str | Path,
    *,
    target: str | None = "aoti",
    force: bool = False,
    calibrate_cache: CalibrationOptions | None = None,
    progress: Progress = no_progress,
    **options: Any,
) -> Bundle:
    """Build the engines of another target into a bundle, which runs on them from then on.

    Args:
        bundle: folder made by :func:`export`.
        target: ``aoti``, ``rtx:sm89`` (and other GPUs, with commas), ``tensorrt``,
            ``tensorrt:sm80+``; ``cuda`` or ``openvino``, which are graphs for providers of ONNX
            Runtime; or ``cpu``, which needs none. None leaves the bundle's own.
        force: build engines that are there too; those of another machine are built anew anyway.
        calibrate_cache: measure what skipping steps costs, with such prompts, and put the table
            into the bundle, for :attr:`~wanx.runtime.options.RunOptions.speedup`.
        progress: told how far each stage is.
        options: of the build, such as TensorRT's ``plugins`` and ``sizes``; see
            :class:`wanx.exporter.targets.options.BuilderOptions`.

    Raises:
        UsageError: an option is out of range, there is no such target, or the bundle is built in.
        WanxError: the bundle is damaged or cannot be written, or the target cannot be built here.
    """
    from wanx.exporter.packages import GRAPHS, require_packages

    require_packages("build", GRAPHS)
    from wanx.builtin import find_bundle, is_builtin
    from wanx.bundle.reader import open_bundle
    from wanx.exporter.build import build as run_build
    from wanx.exporter.targets.options import BuilderOptions
    from wanx.files.hub_cache import is_snapshot
    from wanx.hub.reference import hub_reference

    settings = BuilderOptions(**options)
    if reference := hub_reference(bundle):
        raise UsageError(
            f"{bundle} is on the hub, and engines are built into a copy of one's own: "
            f"hf download {reference.repository} --local-dir NEW"
        )
    folder = find_bundle(bundle)
    if is_builtin(folder):
        raise UsageError(
            f"{bundle} is built in and stays as it is; `wanx export {bundle} --target {target}` "
            "makes a bundle of it"
        )
    if is_snapshot(folder):
        raise UsageError(
            f"{bundle} is in the hub's cache and stays as it is; make a copy and build that: "
            f"cp -RL {shlex.quote(str(folder))} NEW"
        )
    opened = open_bundle(folder)
    if target is not None:
        opened = run_build(opened, target, progress, settings, force=force)
    if calibrate_cache is not None:
        from wanx.exporter.calibration.step_table import add_step_table

        opened = add_step_table(opened, calibrate_cache, progress)
    return opened


def compare(
    candidate: str | Path,
    reference: str | Path,
    *,
    prompts: str | Path | None = None,
    clips: bool = True,
    threads: int | None = None,
    progress: Progress = no_progress,
    **options: Any,
) -> Comparison:
    """Measure the accuracy of a bundle against another one of the same model.

    Args:
        candidate: folder of the bundle in question, or the name of a built-in one.
        reference: the bundle that it should equal, likewise.
        prompts: JSON Lines file with the options of one run a line; None makes one run.
        clips: whether to compare whole videos too, which takes twice as long.
        threads: threads of the processor; None takes all cores.
        progress: told how far each stage is.
        options: of every run, see :class:`wanx.runtime.options.RunOptions`; the seed is 0 unless
            given.

    Raises:
        WanxError: a bundle is damaged, or the two cannot be compared.
    """
    from wanx.benchmarks.accuracy.compare import CompareOptions
    from wanx.benchmarks.accuracy.compare import compare as run_compare
    from wanx.builtin import open_named
    from wanx.runtime.options import RunOptions

    settings = CompareOptions(
        run=RunOptions(**{"seed": 0} | options),
        prompts=None if prompts is None else Path(prompts),
        clips=clips,
        threads=threads,
    )
    return run_compare(
        open_named(candidate, progress), open_named(reference, progress), settings, progress
    )


def bench(
    *bundles: str | Path,
    output: str | Path = "report",
    options: BenchOptions | None = None,
    extras: Extras | None = None,
    command: str = "wanx.bench(...)",
    progress: Progress = no_progress,
) -> Results:
    """Measure how fast bundles are, and write ``report.json``, ``.html`` and ``.md``.

    Args:
        bundles: folders made by :func:`export`, or names of built-in ones; without any, ``tiny``.
        output: folder of the report.
        options: what to measure; see :class:`wanx.benchmarks.speed.suite.BenchOptions`.
        extras: what beside it; see :class:`wanx.benchmarks.speed.bench.Extras`.
        command: that makes the report again, for the report.
        progress: told how far it is.

    Raises:
        CancelledError: it was interrupted; the report has what was measured so far.
        WanxError: a bundle is damaged, or the bundles cannot be compared.
    """
    from wanx.benchmarks.speed.bench import Extras
    from wanx.benchmarks.speed.bench import bench as run_bench
    from wanx.benchmarks.speed.suite import BenchOptions, prepare
    from wanx.builtin import open_named

    opened = [open_named(bundle, progress) for bundle in bundles or ("tiny",)]
    suite = prepare(opened, options or BenchOptions(), command)
    return run_bench(suite, Path(output), extras or Extras(), progress=progress)
