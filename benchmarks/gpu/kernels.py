"""Memory-bound kernels against a copy, and against PyTorch with and without its compiler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.gpu.context import BenchContext, FirstRun
from benchmarks.gpu.distances import differences
from benchmarks.gpu.kernel_cases import KernelCase, families
from benchmarks.gpu.report import Goal, Measurement, ReportItem
from benchmarks.gpu.sizes import Model
from benchmarks.gpu.timing import Call, time_interleaved
from wanx.benchmarks.speed.roofline.gpu_peaks import COPY

OURS, EAGER, COMPILED = "wanx", "torch", "torch.compile"
SHARE = 0.85


def kernels(bench: BenchContext, model: Model, family: str) -> Iterator[ReportItem]:
    """Measure the ops of one family at all sizes of a model."""
    shares: list[float | None] = []
    for size in bench.sizes:
        for case in families(bench, model.config, size.tokens)[family]:
            width = model.config.ffn_dim if family == "gelu_quantize" else model.config.dim
            for row in _measure(bench, case, {"D": width, "L": size.tokens}):
                if row.implementation == OURS:
                    shares.append(row.of_ceiling)
                yield row
            bench.release()
    measured = [share for share in shares if share is not None]
    slowest = min(measured) if len(measured) == len(shares) else None
    yield Goal.at_least(f"all at {SHARE:.0%} of the copy or more", slowest, SHARE)


def _measure(bench: BenchContext, case: KernelCase, shape: dict[str, int]) -> Iterator[Measurement]:
    arguments = case.arguments()
    references = case.references(arguments)
    moved = 0

    def check(result: Any) -> dict[str, float]:
        nonlocal moved
        moved = _bytes(arguments) + _bytes(result)
        return differences(tree_leaves(result), references)

    calls: dict[str, Call] = {
        OURS: lambda: case.ours(*arguments),
        EAGER: lambda: case.reference(*arguments),
    }
    if bench.compiles and case.compiled:
        compiled = torch.compile(case.reference, dynamic=False)
        calls[COMPILED] = lambda: compiled(*arguments)
    runs: dict[str, FirstRun] = {}
    for by, call in calls.items():
        runs[by] = bench.first_run(f"{case.name}, {shape['L']}, {by}", call, check)
    good = {by: call for by, call in calls.items() if runs[by].error is None}
    times = time_interleaved(bench, good, short=True)
    for by, run in runs.items():
        if by not in times:
            yield Measurement(operation=case.name, implementation=by, shape=shape, error=run.error)
            continue
        yield Measurement(
            operation=case.name,
            implementation=by,
            shape=shape,
            times=times[by],
            rate=moved / times[by].median,
            unit="B/s",
            peak=COPY,
            ceiling=bench.ceilings.get(COPY),
            speedup=_speedup(times, by),
            numerics=run.numerics,
        )


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.itemsize for t in tree_leaves(tensors) if isinstance(t, Tensor))


def _speedup(times: dict[str, Any], by: str) -> dict[str, float]:
    if by != OURS:
        return {}
    return {other: times[other].median / times[by].median for other in times if other != by}
