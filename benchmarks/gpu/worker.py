"""Worker: measures one item after the other, and writes down each figure at once.

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
from typing import Any

import torch
import torch._dynamo

from benchmarks.gpu.catalog import CEILINGS, Item, all_items, selected
from benchmarks.gpu.context import BenchContext, DeviceLost, one_line, usable
from benchmarks.gpu.machine import machine
from benchmarks.gpu.report import HEAD, Print, Report
from benchmarks.gpu.sizes import REHEARSAL_MODEL, REHEARSAL_SIZE
from benchmarks.gpu.status import EXIT_DEVICE_LOST, Status
from benchmarks.gpu.supervisor import MARGIN
from wanx.kernels.launch_config import TABLE


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
    until = time.time() + item.limit
    subject: str | None = None

    def note(name: str | None) -> None:
        nonlocal subject
        # The last subject is blamed for a crash between subjects, too; it alone may hang no longer.
        subject = name or subject
        limit = until if name is None else min(until, time.time() + item.subject_seconds)
        Status(item=item.name, subject=subject, until=limit).write(bench.folder)

    def give_up(reason: str, blamed: str | None) -> None:
        Status(item=item.name, subject=blamed, until=until, reason=reason).write(bench.folder)

    bench.item, bench.note = item.name, note
    note(None)
    torch.manual_seed(0)
    start = time.time()
    try:
        with torch.no_grad():
            for figure in item.run(bench):
                report.add(figure)
                tell(figure.line())
    except DeviceLost as error:
        give_up(str(error), subject)
        raise
    except Exception as error:
        reason = one_line(error)
        if not usable(bench.device):
            give_up(reason, None)
            raise DeviceLost(reason) from error
        report.end("failed", time.time() - start, reason)
        tell(f"   failed: {reason}")
    else:
        report.end("measured", time.time() - start)
    gc.collect()
    bench.release()


def tuned_path(report: Path) -> Path:
    """The table that tuning writes beside a report."""
    return report.with_name(f"{report.stem}-tuned.json")


def context_of(report: Report, folder: Path) -> BenchContext:
    """The context that a report's settings ask for: the GPU, or a rehearsal on the processor."""
    settings = report.data["settings"]
    common: dict[str, Any] = {
        "folder": folder,
        "table": TABLE if settings.get("update_table") else tuned_path(report.path),
        "deadline": report.data["started"] + 60 * settings["minutes"] - 2 * MARGIN,
        "crashed": report.data["crashes"],
    }
    if settings.get("rehearsal"):
        return BenchContext(
            device=torch.device("cpu"), models=(REHEARSAL_MODEL,), sizes=(REHEARSAL_SIZE,),
            gemm=128, copy_bytes=1 << 20, compiles=False, seconds_per_comparison=0.0, **common,
        )  # fmt: skip
    bench = BenchContext(device=torch.device("cuda", torch.cuda.current_device()), **common)
    if settings["quick"]:
        bench.sizes, bench.seconds_per_comparison = bench.sizes[:1], 0.5
    return bench


def main() -> None:
    """Go on with a report."""
    report, folder = Report.read(Path(sys.argv[1])), Path(sys.argv[2])
    settings = report.data["settings"]
    bench = context_of(report, folder)
    if "machine" not in report.data:
        report.data["machine"] = machine(bench.device)
        report.save()
        print(" ".join(f"{name}={value}" for name, value in report.data["machine"].items()))
        print(HEAD, flush=True)
    # Beyond the limit, 8, torch.compile would run what it is given as it is, and say nothing.
    torch._dynamo.config.recompile_limit = 64
    items = all_items(bench.models, bench.sizes, quick=settings["quick"])
    try:
        measure(bench, selected(items, settings["only"]), report, lambda s: print(s, flush=True))
    except DeviceLost:
        sys.exit(EXIT_DEVICE_LOST)
    report.finish()


if __name__ == "__main__":
    main()
