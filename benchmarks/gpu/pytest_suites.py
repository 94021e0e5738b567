"""Suites of the project's own tests on the GPU, run by pytest in processes that may crash.

A process that dies or hangs costs the test that it was at; another goes on with the rest.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.context import BenchContext
from benchmarks.gpu.pytest_log import LOG, read_log
from benchmarks.gpu.report import Goal, Measurement, ReportItem, Times
from wanx.benchmarks.process import describe_exit, last_line

ROOT = Path(__file__).parents[2]
# Kernels are interpreted elsewhere, and run on a GPU where there is one.
SUITES = {
    "kernels": ("-m", "not gpu and not slow", "tests/kernels"),
    # All but this benchmark itself.
    "gpu": ("-m", "gpu and not slow", "--ignore=tests/benchmarks/gpu", "tests"),
}
MAX_SECONDS = 180.0
RESERVE = 5.0  # seconds before the end, from which on nothing runs
SILENCE = 60.0  # seconds without the end of a test, after which it hangs
MAX_PROCESSES = 8
_POLL = 0.1


def run_suite(
    bench: BenchContext, name: str, arguments: Sequence[str] = (), root: Path = ROOT
) -> Iterator[ReportItem]:
    """Run a suite as far as time allows; yield what failed, what recorded numbers, and counts."""
    title = f"tests, {name}"
    if find_spec("pytest") is None:
        yield Measurement(operation=title, implementation="pytest", error="pytest is not installed")
        return
    log = bench.folder / f"tests-{name}.jsonl"
    end = time.time() + min(MAX_SECONDS, bench.left() - RESERVE)
    problem = None
    for _ in range(MAX_PROCESSES):
        before = len(read_log(log)[0])
        problem = _run_pytest(arguments or SUITES[name], log, root, end)
        outcomes, running, finished = read_log(log)
        if running is not None and time.time() < end:
            _append(log, {"test": running, "outcome": "failed", "reason": problem or "it ended"})
        if finished or time.time() >= end or len(read_log(log)[0]) == before:
            break
    outcomes, _, finished = read_log(log)
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    for test, outcome in outcomes.items():
        counts[outcome["outcome"]] += 1
        numbers = outcome.get("numbers", {})
        if outcome["outcome"] == "failed" or numbers:
            yield Measurement(
                operation=test,
                implementation="pytest",
                times=Times(seconds=(outcome.get("seconds", 0.0),)),
                numerics={n: v for n, v in numbers.items() if isinstance(v, float)},
                details={"outcome": outcome["outcome"], "recorded": numbers},
                error=outcome["reason"] if outcome["outcome"] == "failed" else None,
            )
    skipped = {o["reason"] for o in outcomes.values() if o["outcome"] == "skipped"}
    yield Measurement(
        operation=title,
        implementation="pytest",
        numerics={kind: float(count) for kind, count in counts.items()},
        details={"all_ran": finished, "skipped_because": sorted(skipped)},
        error=None if outcomes else problem or "there are no tests",
    )
    yield Goal.at_most(f"{title} that fail", counts["failed"], 0)


def _run_pytest(arguments: Sequence[str], log: Path, root: Path, end: float) -> str | None:
    """Run the tests that the log has not; return why the process ended, None if it was done."""
    output = log.with_suffix(".txt")
    command = [
        *(sys.executable, "-m", "pytest", "-q", "--show-capture=no", "-p", "no:cacheprovider"),
        *("--continue-on-collection-errors", "-p", "benchmarks.gpu.pytest_log", *arguments),
    ]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, LOG: str(log), "PYTHONPATH": path}
    with output.open("w", encoding="utf-8") as file:
        # A group of its own, which is ended here, in the session that the supervisor ends.
        process = subprocess.Popen(
            command, cwd=root, env=environment, stdin=subprocess.DEVNULL, stdout=file,
            stderr=file, process_group=0,
        )  # fmt: skip
        last = time.time()
        try:
            while process.poll() is None:
                now = time.time()
                with suppress(OSError):
                    last = max(last, log.stat().st_mtime)
                if now > end:
                    return "the time was over"
                if now > last + SILENCE:
                    return f"it did not come to an end within {SILENCE:.0f} s"
                time.sleep(_POLL)
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode in (0, 1, 5):  # passed, failed, nothing left
        return None
    said = last_line(output)
    return describe_exit(process.returncode) + (f": {said}" if said else "")


def _append(log: Path, record: dict[str, Any]) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
