"""One denoising step of a transformer, two branches with guidance, by ourselves and by others.

A few blocks are timed, with what comes before and after them, and without any block. All blocks
being alike, the difference gives the time of one, and that of the whole depth.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.gpu.context import BenchContext, FirstRun, no_metrics
from benchmarks.gpu.distances import cosine
from benchmarks.gpu.dit_variants import (
    CompiledDiT,
    DiffusersDiT,
    DiTVariant,
    EagerDiT,
    diffusers_version,
    plain,
)
from benchmarks.gpu.plain_dit import BlockCall, PlainDiT
from benchmarks.gpu.programs import compile_error
from benchmarks.gpu.random_dit import (
    Weights,
    input_amax,
    quantized,
    random_inputs,
    random_weights,
    recipe_of,
    with_blocks,
)
from benchmarks.gpu.report import Goal, Measurement, ReportItem, Times
from benchmarks.gpu.sizes import PRECISIONS, Model, Size, step_flops
from benchmarks.gpu.timing import Call, time_interleaved
from wanx.benchmarks.speed.roofline.gpu_peaks import BF16
from wanx.bundle.engine_schedule import SCHEDULE
from wanx.config.models import DiTConfig
from wanx.exporter.components import dit_spec
from wanx.exporter.quantization.quantized_spec import quantized_spec

EAGER, COMPILED, DIFFUSERS, OURS = "torch", "torch.compile", "diffusers", "wanx"
WHAT = "step"
# Seconds of a step that are to be reached, by model, size and the precision that has to.
_SECONDS = {
    ("14B", "480P", "fp8"): 3.9,
    ("14B", "720P", "fp8"): 15.5,
    ("1.3B", "480P", ""): 0.75,
}


class Setup:
    """The subjects of one model at one size, all with the same random weights."""

    def __init__(self, bench: BenchContext, model: Model, size: Size, dtype: torch.dtype) -> None:
        self.model, self.size, self.dtype = model, size, dtype
        self.config: DiTConfig = with_blocks(model.config, size.blocks)
        self.inputs = random_inputs(bench, self.config, size.grid)
        self.weights = random_weights(bench, self.config, dtype)
        self.plain = plain_model(self.config, self.weights)
        self.subjects: dict[str, DiTVariant] = {}
        self.details: dict[str, dict[str, Any]] = {}
        self._amax: dict[str, float] = {}

    @property
    def blocks(self) -> list[BlockCall]:
        """Those of the plain module."""
        return cast(list[BlockCall], list(self.plain.blocks))

    def add(self, name: str, subject: DiTVariant, weights: Weights, **details: Any) -> None:
        """Let a subject take part."""
        in_blocks = sum(_bytes(t) for n, t in weights.items() if n.startswith("blocks."))
        all_of_them = sum(map(_bytes, weights.values()))
        whole = all_of_them + in_blocks * (self.model.config.num_layers / self.size.blocks - 1)
        self.subjects[name] = subject
        self.details[name] = {**details, "weights_of_all_blocks_bytes": int(whole)}

    def add_ours(self, bench: BenchContext, precision: str) -> None:
        """Let ourselves take part, compiled if that succeeded."""
        spec, weights = dit_spec(self.config), self.weights
        if precision != "bf16":
            self._amax = self._amax or input_amax(self.plain, self.inputs[0])
            recipe = recipe_of(self.config, precision == "fp8-attention", self._amax)
            spec, weights = quantized_spec(spec, recipe), quantized(weights, recipe)
        folder = bench.folder / f"{self.model.name}-{precision}"
        name = f"{OURS} {precision}"
        if (folder / SCHEDULE).exists():
            self.add(name, CompiledDiT(folder, weights, self.size.blocks), weights, compiled=True)
        else:
            reason = compile_error(folder)
            subject = EagerDiT(spec, self.dtype, weights)
            self.add(name, subject, weights, compiled=False, not_compiled_because=reason)


def plain_model(config: DiTConfig, weights: Weights) -> PlainDiT:
    """The plain module on the tensors of ``weights`` themselves."""
    with torch.device("meta"):
        model = PlainDiT(config)
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def dit_step(
    bench: BenchContext, model: Model, size: Size, *, dtype: torch.dtype = torch.bfloat16
) -> Iterator[ReportItem]:
    """Measure everybody."""
    setup = Setup(bench, model, size, dtype)
    setup.add(EAGER, plain(setup.plain, setup.blocks), setup.weights)
    absent: dict[str, str] = {}
    for name, reason in add_others(bench, setup):
        absent[name] = reason
    first_runs = _first_runs(bench, setup)
    times = time_steps(
        bench, setup, [name for name in first_runs if first_runs[name].error is None]
    )
    yield from _rows(bench, setup, first_runs, times)
    for name, reason in absent.items():
        yield Measurement(operation=WHAT, implementation=name, error=reason)
    yield from _goals(setup, first_runs, times)
    _forget(bench, setup)


def add_others(bench: BenchContext, setup: Setup) -> Iterator[tuple[str, str]]:
    """Add all but the plain module; tells who cannot take part, and why."""
    if bench.compiles:
        # Blocks alone: they are nearly all of the work, and equal ones are compiled once.
        compiled = [torch.compile(block, dynamic=False) for block in setup.blocks]
        setup.add(COMPILED, plain(setup.plain, compiled), setup.weights, compiled="each block")
    if diffusers_version() is None:
        yield DIFFUSERS, "diffusers is not installed"
    else:

        def add_diffusers() -> None:
            peer = DiffusersDiT(setup.config, setup.size.grid, setup.weights)
            setup.add(DIFFUSERS, peer, setup.weights, version=diffusers_version())

        if error := bench.first_run(DIFFUSERS, add_diffusers, no_metrics).error:
            yield DIFFUSERS, error
    for precision in PRECISIONS:
        name = f"{OURS} {precision}"
        if error := bench.first_run(
            name, partial(setup.add_ours, bench, precision), no_metrics
        ).error:
            yield name, error


def _first_runs(bench: BenchContext, setup: Setup) -> dict[str, FirstRun]:
    """Run everybody once, and compare with the plain module."""
    values, count = setup.inputs[0], setup.size.blocks
    velocity, stream = setup.plain(values)
    _, before = setup.plain(values, [])
    update = stream - before
    del stream

    def check(result: tuple[Tensor, Tensor | None]) -> dict[str, float]:
        metrics = {"velocity_cosine": cosine(result[0], velocity)}
        if result[1] is not None:
            # What the blocks add: the stream itself would be alike whatever they do.
            metrics["blocks_cosine"] = cosine(result[1] - before, update)
        return metrics

    first_runs = {}
    for name, subject in setup.subjects.items():
        call = partial(subject, values, count)
        first_runs[name] = bench.first_run(name, call, check)
        if first_runs[name].error is None:
            # The first run also compiles and packs; only a second one shows what a run takes.
            setup.details[name]["beyond_weights_bytes"] = bench.peak_of(call)
    return first_runs


def time_steps(
    bench: BenchContext, setup: Setup, names: list[str], blocks: int | None = None
) -> dict[str, Times]:
    """Time both branches, with ``blocks`` and without any; scale to all, round by round."""
    count = blocks or setup.size.blocks

    def step(subject: DiTVariant, count: int) -> Call:
        def call() -> None:
            for values in setup.inputs:
                subject(values, count)

        return call

    calls: dict[str, Call] = {}
    for name in names:
        calls[name] = step(setup.subjects[name], count)
        calls[f"{name}, no blocks"] = step(setup.subjects[name], 0)
    timings = time_interleaved(bench, calls)
    layers = setup.model.config.num_layers
    scaled = {}
    for name in names:
        timed, ends = timings[name].seconds, timings[f"{name}, no blocks"].seconds
        setup.details[name] |= {
            "blocks_timed": count,
            "scaled_to": layers,
            "timed_ms": [1e3 * seconds for seconds in timed],
            "no_blocks_ms": [1e3 * seconds for seconds in ends],
        }
        pairs = zip(timed, ends, strict=True)
        scaled[name] = Times(seconds=tuple(e + (t - e) / count * layers for t, e in pairs))
    return scaled


def _rows(
    bench: BenchContext, setup: Setup, first_runs: dict[str, FirstRun], times: dict[str, Times]
) -> Iterator[Measurement]:
    work = step_flops(setup.model.config, setup.size.tokens)
    for name, first_run in first_runs.items():
        if name not in times:
            yield Measurement(
                operation=WHAT, implementation=name, shape=shape_of(setup), error=first_run.error
            )
            continue
        others = [o for o in (EAGER, COMPILED, DIFFUSERS) if o in times and o != name]
        yield Measurement(
            operation=WHAT,
            implementation=name,
            shape=shape_of(setup),
            times=times[name],
            rate=work / times[name].median,
            peak=BF16,
            ceiling=bench.ceilings.get(BF16),
            speedup={o: times[o].median / times[name].median for o in others},
            numerics=first_run.numerics,
            details=setup.details[name],
        )


def shape_of(setup: Setup) -> dict[str, int]:
    """Sizes for a row."""
    return {"L": setup.size.tokens}


def _goals(
    setup: Setup, first_runs: dict[str, FirstRun], times: dict[str, Times]
) -> Iterator[Goal]:
    ours = {name: times[name].median for name in times if name.startswith(OURS)}
    if setup.model.name == "14B":
        bf16, compiled = ours.get(f"{OURS} bf16"), times.get(COMPILED)
        ratio = None if bf16 is None or compiled is None else compiled.median / bf16
        yield Goal.at_least("bf16 1.25 times as fast as torch.compile", ratio, 1.25)
    for (model, size, precision), most in _SECONDS.items():
        if (model, size) == (setup.model.name, setup.size.name):
            seconds = [s for name, s in ours.items() if name.startswith(f"{OURS} {precision}")]
            goal = f"{precision or 'the fastest'} in {most:g} s at most".strip()
            yield Goal.at_most(goal, min(seconds, default=None), most)
    cosines = [
        value
        for name, first_run in first_runs.items()
        if name.startswith(f"{OURS} fp8")
        for value in first_run.numerics.values()
    ]
    worst = min(cosines, default=None)
    yield Goal.at_least("cosines of fp8 with bf16 0.99", worst, 0.99)


def _forget(bench: BenchContext, setup: Setup) -> None:
    setup.subjects.clear()
    gc.collect()
    bench.release()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def compile_ahead(bench: BenchContext, model: Model) -> None:
    """Compile the plain module's block at all sizes, so that no measurement waits for it."""
    for size in bench.sizes:
        setup = Setup(bench, model, size, torch.bfloat16)
        block = torch.compile(setup.plain.blocks[0], dynamic=False)
        setup.plain(setup.inputs[0], [block])
        _forget(bench, setup)
