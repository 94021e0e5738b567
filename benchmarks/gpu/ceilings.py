"""Peaks of the device: matrix products and copies of PyTorch's own libraries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.bench import Bench, nothing
from benchmarks.gpu.report import Found, Row
from benchmarks.gpu.rounds import take_turns
from wanx.benchmarks.speed.roofline.gpu_peaks import COPY, peak_calls, work


def ceilings(bench: Bench) -> Iterator[Found]:
    """Products of square matrices, and a copy, whose bytes count when read and when written."""
    calls = peak_calls(bench.device, bench.gemm, bench.copied)
    errors = {name: bench.attempt(name, call, nothing).error for name, call in calls.items()}
    times = take_turns(bench, {n: c for n, c in calls.items() if errors[n] is None}, short=True)
    for name in calls:
        if name not in times:
            yield Row(what=name, by="torch", error=errors[name])
            continue
        rate = work(name, bench.gemm, bench.copied) / times[name].median
        bench.ceilings[name] = rate
        unit = "B/s" if name == COPY else "FLOP/s"
        shape = {"bytes": bench.copied} if name == COPY else {"n": bench.gemm}
        yield Row(what=name, by="torch", shape=shape, times=times[name], rate=rate, unit=unit)


def recall(bench: Bench, rows: list[dict[str, Any]]) -> None:
    """Take the ceilings from what a process before this one measured."""
    bench.ceilings |= {row["what"]: row["rate"] for row in rows if "rate" in row}
