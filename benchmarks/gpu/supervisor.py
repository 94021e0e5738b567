"""Supervision of the worker: restarted after a crash, killed when it hangs or time is over."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu.programs import MAX_SECONDS, MAX_SHARE, Compilation, Job
from benchmarks.gpu.report import Print, Report
from benchmarks.gpu.status import EXIT_DEVICE_LOST, Status
from wanx.benchmarks.process import child_session, describe_exit

MAX_RESTARTS = 12
MARGIN = 3.0  # seconds before the end: time to kill what still runs, and for the table
_POLL = 0.2


def new_report(
    path: Path,
    *,
    minutes: float,
    only: Sequence[str] = (),
    quick: bool = False,
    rehearsal: bool = False,
    update_table: bool = False,
    started: float | None = None,
) -> Report:
    """An empty report, written.

    Raises:
        WanxError: it cannot be written.
    """
    arguments = ["-o", str(path), "--minutes", f"{minutes:g}"]
    if only:
        arguments += ["--only", *only]
    flags = {"--quick": quick, "--rehearse": rehearsal, "--update-table": update_table}
    arguments += [flag for flag, is_set in flags.items() if is_set]
    command = shlex.join(["python", "-m", "benchmarks.gpu", *arguments])
    data: dict[str, Any] = {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "started": started or time.time(),
        "settings": {
            "minutes": minutes, "only": list(only), "quick": quick, "rehearsal": rehearsal,
            "update_table": update_table,
        },
    }  # fmt: skip
    report = Report(path, data)
    report.save()
    return report


def supervise(
    report: Report,
    folder: Path,
    tell: Print,
    command: Sequence[str] | None = None,
    jobs: Sequence[Job] = (),
) -> Report:
    """Run the worker; restart it after a crash, at most ``MAX_RESTARTS`` times.

    Args:
        report: a new one.
        folder: for what is compiled, and for the worker's status.
        tell: shows a line.
        command: of the worker; report and folder are added to it.
        jobs: compiled beside the worker.

    Returns:
        The report as it is in the end, before the minutes are over.
    """
    command = command or (sys.executable, "-m", "benchmarks.gpu.worker")
    started, seconds = report.data["started"], 60 * report.data["settings"]["minutes"]
    end = started + seconds - MARGIN
    limit = started + min(MAX_SECONDS, MAX_SHARE * seconds)
    with Compilation(jobs, folder, limit) as compilation:
        for _ in range(MAX_RESTARTS + 1):
            reason = _run_worker(
                (*command, str(report.path), str(folder)), folder, end, compilation
            )
            report = Report.read(report.path)
            if report.data["complete"]:
                break
            tell(f"   the process was lost: {reason}")
            if not report.items or report.items[-1]["status"] != "running":
                break  # another would get no further
            if time.time() > end:
                report.end("failed", 0, reason)
                break
            record_crash(report, Status.read(folder), reason)
    return report


def record_crash(report: Report, status: Status | None, reason: str) -> None:
    """Write down what was running, so that the next process does not run it again."""
    name = report.items[-1]["name"]
    if status is None or status.item != name:
        report.end("failed", 0, reason)
        return
    reason = status.reason or reason
    key = f"{name}/{status.subject}"
    if status.subject is None or key in report.data["crashes"]:
        report.end("failed", 0, reason)
        return
    # The item is measured once more, without the subject.
    report.data["crashes"][key] = f"the process was lost: {reason}"
    report.items.pop()
    report.save()


def _run_worker(command: Sequence[str], folder: Path, end: float, compilation: Compilation) -> str:
    """Run a worker until it ends, hangs or has no time left; return how it ended."""
    Status.clear(folder)
    environment = {**os.environ, "WANX_STRICT": "1"}  # a kernel that cannot run must not go unseen
    with child_session(command, env=environment) as process:
        while process.poll() is None:
            compilation.poll()
            now = time.time()
            status = Status.read(folder)
            if now > end:
                return "the time was over"
            if status is not None and now > status.until:
                return "it did not come to an end"
            time.sleep(_POLL)
        code = process.returncode
    return "the GPU does not answer" if code == EXIT_DEVICE_LOST else describe_exit(code)
