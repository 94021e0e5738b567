"""Starts the process that measures, and another one when that is lost."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import Print, Report
from benchmarks.gpu.status import EXIT_DEVICE_LOST, Status

MOST_RESTARTS = 12
GRACE = 15.0  # seconds after the end for what is still running
_POLL = 0.2


def new_report(path: Path, *, minutes: float, only: Sequence[str], quick: bool) -> Report:
    """An empty report, written."""
    arguments = ["-o", str(path), "--minutes", f"{minutes:g}"]
    if only:
        arguments += ["--only", *only]
    if quick:
        arguments.append("--quick")
    command = shlex.join(["python", "-m", "benchmarks.gpu", *arguments])
    data: dict[str, Any] = {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "started": time.time(),
        "settings": {"minutes": minutes, "only": list(only), "quick": quick},
    }
    report = Report(path, data)
    report.save()
    return report


def supervise(
    report: Report, folder: Path, tell: Print, command: Sequence[str] | None = None
) -> Report:
    """Have everything measured, whatever happens to the process that does it.

    Args:
        report: a new one.
        folder: for what is compiled, and for what the processes tell each other.
        tell: shows a line.
        command: of the worker; report and folder are added to it.

    Returns:
        The report as it is in the end.
    """
    command = command or (sys.executable, "-m", "benchmarks.gpu.worker")
    end = report.data["started"] + 60 * report.data["settings"]["minutes"] + GRACE
    for _ in range(MOST_RESTARTS + 1):
        reason = _work((*command, str(report.path), str(folder)), folder, end)
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


def record_crash(report: Report, doing: Status | None, reason: str) -> None:
    """Write down what was running, so that the next process does not run it again."""
    name = report.items[-1]["name"]
    if doing is None or doing.item != name:
        report.end("failed", 0, reason)
        return
    reason = doing.reason or reason
    key = f"{name}/{doing.subject}"
    if doing.subject is None or key in report.data["crashes"]:
        report.end("failed", 0, reason)
        return
    # The item is measured once more, without the subject.
    report.data["crashes"][key] = f"the process was lost: {reason}"
    report.items.pop()
    report.save()


def _work(command: Sequence[str], folder: Path, end: float) -> str:
    """Run a worker, and say how it ended."""
    Status.forget(folder)
    environment = {**os.environ, "WANX_STRICT": "1"}  # a kernel that cannot run must not go unseen
    # A session of its own, so that what it has started ends with it.
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        while process.poll() is None:
            now = time.time()
            doing = Status.read(folder)
            if now > end:
                return "the time was over"
            if doing is not None and now > doing.until:
                return "it did not come to an end"
            time.sleep(_POLL)
    finally:
        _kill(process)
    code = process.returncode
    if code == EXIT_DEVICE_LOST:
        return "the GPU does not answer"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
