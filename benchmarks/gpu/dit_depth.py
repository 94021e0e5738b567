"""Optional step benchmarks: all blocks; max-autotune."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu.context import BenchContext, no_metrics
from benchmarks.gpu.dit_step import COMPILED, EAGER, OURS, Setup, shape_of, time_steps
from benchmarks.gpu.dit_variants import plain
from benchmarks.gpu.plain_dit import BlockCall
from benchmarks.gpu.report import Measurement, ReportItem, Times
from benchmarks.gpu.sizes import PRECISIONS, Model, Size
from benchmarks.gpu.timing import time_interleaved

WHAT = "step, all blocks"
TUNED = "torch.compile, max-autotune"


def whole_depth(
    bench: BenchContext, model: Model, size: Size, *, dtype: torch.dtype = torch.bfloat16
) -> Iterator[ReportItem]:
    """Run all blocks of ours, to see whether a few of them, scaled, tell the truth.

    A GPU that is busy for seconds gets hot and slows down; a few blocks don't show that.
    """
    setup = Setup(bench, model, size, dtype)
    layers, precision = model.config.num_layers, PRECISIONS[-1]
    name = f"{OURS} {precision}"
    setup.add_ours(bench, precision)
    subject = setup.subjects[name]
    first_run = bench.first_run(name, partial(subject, setup.inputs[0], 1), no_metrics)
    if first_run.error is not None:
        yield Measurement(
            operation=WHAT, implementation=name, shape=shape_of(setup), error=first_run.error
        )
        return
    scaled = time_steps(bench, setup, [name])[name]

    def step() -> None:
        for values in setup.inputs:
            subject(values, layers)

    times = time_interleaved(bench, {name: step})[name]
    yield Measurement(
        operation=WHAT,
        implementation=name,
        shape=shape_of(setup),
        times=times,
        numerics={"scaled_over_measured": scaled.median / times.median},
        details={"blocks_timed": layers, "scaled_ms": 1e3 * scaled.median},
    )


def autotuned(bench: BenchContext, model: Model, size: Size) -> Iterator[ReportItem]:
    """The plain module under a compiler that tries many kernels, against its default."""
    setup = Setup(bench, model, size, torch.bfloat16)
    modes = {COMPILED: None, TUNED: "max-autotune-no-cudagraphs"}
    setup.add(EAGER, plain(setup.plain, setup.blocks), setup.weights)
    for name, mode in modes.items():
        blocks: list[BlockCall] = [
            torch.compile(block, dynamic=False, mode=mode) for block in setup.blocks
        ]
        setup.add(name, plain(setup.plain, blocks), setup.weights, mode=mode)
    first_runs = {
        name: bench.first_run(name, partial(subject, setup.inputs[0], 1), no_metrics)
        for name, subject in setup.subjects.items()
    }
    good = [name for name, first_run in first_runs.items() if first_run.error is None]
    times: dict[str, Times] = time_steps(bench, setup, good)
    for name, first_run in first_runs.items():
        if name not in times:
            yield Measurement(
                operation="step", implementation=name, shape=shape_of(setup), error=first_run.error
            )
            continue
        speedup = {EAGER: times[EAGER].median / times[name].median} if EAGER in times else {}
        yield Measurement(
            operation="step",
            implementation=name,
            shape=shape_of(setup),
            times=times[name],
            speedup=speedup,
            details=setup.details[name],
        )
