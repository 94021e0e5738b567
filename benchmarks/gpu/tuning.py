"""Tuning of one op's kernels, written to a table of its own beside the report."""

from __future__ import annotations

import time
from collections.abc import Iterator

from benchmarks.gpu.context import BenchContext
from benchmarks.gpu.report import Measurement, ReportItem
from benchmarks.tuning.tune import gpu_timer, gpu_versions, tune
from benchmarks.tuning.workloads import workloads
from wanx.errors import EnvironmentMismatchError
from wanx.kernels.launch import sm_of
from wanx.kernels.launch_config import TABLE, Entry, dump_table, load_table, merge_entries

SECONDS = 40.0  # for the candidates of one workload; what is not tried then is dropped


def tuning(bench: BenchContext, op: str) -> Iterator[ReportItem]:
    """Tune an op at Wan's sizes, and add what wins to the table.

    The kernels of this process do not change.

    Raises:
        EnvironmentMismatchError: there is no GPU.
    """
    if bench.device.type != "cuda":
        raise EnvironmentMismatchError("tuning needs an NVIDIA GPU; run it where kernels will run")
    sm = sm_of(bench.random(1))
    versions, timer = gpu_versions(bench.device), gpu_timer(op, bench.device)
    table = bench.table
    for workload in workloads(op, bench.device):
        shape = " ".join(f"{name}={size}" for name, size in workload.shape.items())
        outcome: list[tuple[str, Entry | None]] = []

        def call(workload=workload, outcome=outcome):  # type: ignore[no-untyped-def]
            limit = time.monotonic() + min(SECONDS, bench.left() / 2)
            outcome.append(tune(workload, sm, versions, timer, limit))

        run = bench.first_run(f"{op}, {shape}", call, lambda result: {})
        if not outcome:
            yield Measurement(operation=op, implementation="tuning", error=run.error)
            continue
        report, entry = outcome[0]
        if entry is not None:
            dump_table(
                merge_entries(load_table(table if table.exists() else TABLE), [entry]), table
            )
        measured = {} if entry is None else {"choice": entry.choice, "measured": entry.measured}
        microseconds = {} if entry is None else (entry.measured or {}).get("us", {})
        yield Measurement(
            operation=op,
            implementation="tuning",
            shape=workload.shape,
            # The line of the table: microseconds of the best and of what was in use.
            numerics={f"us of {name}": us for name, us in microseconds.items()},
            details={"report": report, **measured},
            error=None if entry is not None else report.replace("\n", ";"),
        )
        bench.release()
