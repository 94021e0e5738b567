"""Measures one item after the other, and writes down each at once.

It is a process of its own, since a kernel that goes wrong may take the whole process with it; then
:mod:`benchmarks.gpu.supervisor` starts another, which goes on.

    python -m benchmarks.gpu.worker REPORT FOLDER
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch._dynamo

from benchmarks.gpu.catalog import CEILINGS, Item, every, selected
from benchmarks.gpu.context import BenchContext, DeviceLost, one_line, usable
from benchmarks.gpu.machine import machine
from benchmarks.gpu.report import HEAD, Print, Report
from benchmarks.gpu.status import EXIT_DEVICE_LOST, Status


def measure(bench: BenchContext, items: Sequence[Item], report: Report, tell: Print) -> None:
    """Measure all items that the report has not yet.

    Raises:
        DeviceLost: this process can go on no more; the report says which item it was at.
    """
    done = {record["name"]: record for record in report.items}
    if CEILINGS in done:
        from benchmarks.gpu.ceilings import recall

        recall(bench, done[CEILINGS]["rows"])
    for item in items:
        if item.name in done:
            continue
        if bench.left() < item.seconds:
            reason = f"it may take {item.seconds:.0f} s, and {max(bench.left(), 0):.0f} s are left"
            report.begin(item.name, "skipped", reason)
            tell(f"-- {item.name}: skipped, {reason}")
            continue
        report.begin(item.name)
        tell(f"-- {item.name}")
        _run(bench, item, report, tell)


def _run(bench: BenchContext, item: Item, report: Report, tell: Print) -> None:
    until = time.time() + 3 * item.seconds + 60
    subject: str | None = None

    def note(name: str) -> None:
        nonlocal subject
        subject = name
        Status(item=item.name, subject=name, until=until).write(bench.folder)

    bench.item, bench.note = item.name, note
    Status(item=item.name, subject=None, until=until).write(bench.folder)
    torch.manual_seed(0)
    start = time.time()
    try:
        with torch.no_grad():
            for found in item.run(bench):
                report.add(found)
                tell(found.line())
    except DeviceLost as error:
        Status(item=item.name, subject=subject, until=until, reason=str(error)).write(bench.folder)
        raise
    except Exception as error:
        reason = one_line(error)
        if not usable(bench.device):
            Status(item=item.name, subject=None, until=until, reason=reason).write(bench.folder)
            raise DeviceLost(reason) from error
        report.end("failed", time.time() - start, reason)
        tell(f"   failed: {reason}")
    else:
        report.end("measured", time.time() - start)
    gc.collect()
    bench.release()


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def main() -> None:
    """Go on with a report."""
    report, folder = Report.read(Path(sys.argv[1])), Path(sys.argv[2])
    settings = report.data["settings"]
    bench = BenchContext(
        device=_device(),
        folder=folder,
        deadline=report.data["started"] + 60 * settings["minutes"],
        crashed=report.data["crashes"],
    )
    if settings["quick"]:
        bench.sizes, bench.seconds_per_comparison = bench.sizes[:1], 0.5
    if "machine" not in report.data:
        report.data["machine"] = machine(bench.device)
        report.save()
        print(" ".join(f"{name}={value}" for name, value in report.data["machine"].items()))
        print(HEAD, flush=True)
    # Beyond the limit, 8, torch.compile would run what it is given as it is, and say nothing.
    torch._dynamo.config.recompile_limit = 64
    items = every(bench.models, bench.sizes, quick=settings["quick"])
    try:
        measure(bench, selected(items, settings["only"]), report, lambda s: print(s, flush=True))
    except DeviceLost:
        sys.exit(EXIT_DEVICE_LOST)
    report.finish()


if __name__ == "__main__":
    main()
