"""The GPU benchmark on the processor: a tiny transformer, tiny videos, and what items give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.catalog import Item
from benchmarks.gpu.context import BenchContext
from benchmarks.gpu.report import Report, ReportItem
from benchmarks.gpu.sizes import REHEARSAL_MODEL, REHEARSAL_SIZE, Model
from benchmarks.gpu.worker import measure

CONFIG = REHEARSAL_MODEL.config
# A model of the name that goals are for.
MODEL = Model(name="14B", config=CONFIG)
SIZE = REHEARSAL_SIZE


def tiny_bench(folder: Path, **changes: Any) -> BenchContext:
    return BenchContext(
        device=torch.device("cpu"),
        folder=folder,
        models=(MODEL,),
        sizes=(SIZE,),
        gemm=64,
        copy_bytes=1 << 12,
        compiles=False,
        seconds_per_comparison=0.0,
        **changes,
    )


def item(
    name: str, run: Callable[[BenchContext], Iterable[ReportItem]], seconds: float = 1
) -> Item:
    def iterate(bench: BenchContext) -> Iterator[ReportItem]:
        yield from run(bench)

    return Item(name=name, seconds=seconds, run=iterate)


def run_items(bench: BenchContext, *items: Item) -> tuple[Report, list[str]]:
    """Measure items; return the report as it was read back, and the lines of the table."""
    path = bench.folder / "report.json"
    report = Report(path, {"settings": {}, "started": 0.0})
    lines: list[str] = []
    measure(bench, items, report, lines.append)
    return Report.read(path), lines


def run_one(
    bench: BenchContext, run: Callable[[BenchContext], Iterable[ReportItem]]
) -> dict[str, Any]:
    """Measure one thing; it must not fail."""
    report, _ = run_items(bench, item("one", run))
    (record,) = report.items
    assert record["status"] == "measured", record
    return record
