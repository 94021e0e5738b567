"""Peaks of the device: matrix products and copies of PyTorch's own libraries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.context import BenchContext, no_metrics
from benchmarks.gpu.report import Measurement, ReportItem
from benchmarks.gpu.timing import time_interleaved
from wanx.benchmarks.speed.roofline.gpu_peaks import COPY, peak_calls, work


def ceilings(bench: BenchContext) -> Iterator[ReportItem]:
    """Products of square matrices, and a copy, whose bytes count when read and when written."""
    calls = peak_calls(bench.device, bench.gemm, bench.copy_bytes)
    errors = {name: bench.first_run(name, call, no_metrics).error for name, call in calls.items()}
    times = time_interleaved(
        bench, {n: c for n, c in calls.items() if errors[n] is None}, short=True
    )
    for name in calls:
        if name not in times:
            yield Measurement(operation=name, implementation="torch", error=errors[name])
            continue
        rate = work(name, bench.gemm, bench.copy_bytes) / times[name].median
        bench.ceilings[name] = rate
        unit = "B/s" if name == COPY else "FLOP/s"
        shape = {"bytes": bench.copy_bytes} if name == COPY else {"n": bench.gemm}
        yield Measurement(
            operation=name,
            implementation="torch",
            shape=shape,
            times=times[name],
            rate=rate,
            unit=unit,
        )


def recall(bench: BenchContext, rows: list[dict[str, Any]]) -> None:
    """Take the ceilings from what a process before this one measured."""
    bench.ceilings |= {row["what"]: row["rate"] for row in rows if "rate" in row}
