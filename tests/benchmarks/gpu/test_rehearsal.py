"""The whole run on the processor, with a kernel that ends its process and one that hangs."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.programs import Job
from benchmarks.gpu.report import Report
from benchmarks.gpu.supervisor import new_report, supervise
from benchmarks.gpu.table import final_table
from tests.support.paths import ROOT

# The worker itself, but for two kernels and the time that one may take.
WORKER = """
import os, sys, time
from dataclasses import replace
sys.path.insert(0, {root!r})
from functools import partial
from benchmarks.gpu import catalog, kernel_cases, numerics, worker

numerics.numerics = partial(numerics.numerics, tokens=17)
kernel_cases.gated_residual = lambda *_: os.abort()
kernel_cases.rms_norm = lambda *_, **__: time.sleep(600)

def selected(items, only):
    chosen = catalog.selected(items, only)
    return [replace(item, seconds=1, max_seconds=600, subject_seconds={seconds}) for item in chosen]

worker.selected = selected
worker.main()
"""


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that wait for each other are most of the time of tensors this small."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def rehearse(
    folder: Path, only: list[str], *, minutes: float, seconds: float, jobs: Any = ()
) -> tuple[Report, float]:
    """Supervise the planted worker; return the report and how long all of it took."""
    script = folder / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT), seconds=seconds))
    start = time.time()
    report = new_report(folder / "gpu.json", minutes=minutes, only=only, rehearsal=True)
    report = supervise(report, folder, print, (sys.executable, str(script)), jobs)
    return report, time.time() - start


def test_a_crash_and_a_hang_cost_one_kernel_each(tmp_path: Path) -> None:
    report, _ = rehearse(
        tmp_path, ["numerics", "kernels-tiny-quantize", "generation"], minutes=5, seconds=8
    )
    crash, hang = (
        "the process was lost: signal SIGABRT",
        "the process was lost: it did not come to an end",
    )
    assert report.data["crashes"] == {
        "numerics/gated_residual": crash,
        "numerics/rms_norm": hang,
    }
    assert report.data["complete"] is True
    items = {item["name"]: item for item in report.items}
    numerics = items["numerics"]
    errors = {row["what"]: row["error"] for row in numerics["rows"] if "error" in row}
    assert errors == {"gated_residual": crash, "rms_norm": hang}
    assert all(row["within"] for row in numerics["rows"] if "error" not in row)
    assert [goal["value"] for goal in numerics["goals"]] == [2]
    # What is not compiled says so, and the rest goes on.
    assert items["generation"]["reason"].endswith("was not compiled: it was not asked for")
    rows = items["kernels-tiny-quantize"]["rows"]
    assert [row["by"] for row in rows] == ["wanx", "torch"] * 2
    assert all(row["ms"] > 0 for row in rows)
    table = "\n".join(final_table(report))
    for line in ("crash at numerics/rms_norm: ", "missed in numerics: ", "was not compiled"):
        assert line in table


def test_the_minutes_are_never_exceeded(tmp_path: Path) -> None:
    """Neither by a kernel that hangs, nor by what compiles, whatever that has started."""
    pid = tmp_path / "pid"
    code = (
        "import os, pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],"
        " process_group=0)\n"
        f"pathlib.Path({str(pid)!r}).write_text(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    job = Job(name="slow", command=(sys.executable, "-c", code))
    minutes = 0.5
    report, seconds = rehearse(
        tmp_path, ["kernels-tiny-rms_norm"], minutes=minutes, seconds=600, jobs=[job]
    )
    assert seconds < 60 * minutes
    assert (tmp_path / "slow.error").read_text().startswith("it was not done within ")
    assert not running(int(pid.read_text()))
    assert report.items[-1]["status"] in ("failed", "skipped")
    assert report.data["crashes"] == {}


def running(pid: int) -> bool:
    """Check that a process has not ended; one that nobody has waited for yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_worker_does_not_outlive_its_supervisor_s_patience(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    script = tmp_path / "worker.py"
    script.write_text(
        f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid()));"
        "time.sleep(600)"
    )
    report = new_report(tmp_path / "gpu.json", minutes=0.1)
    report = supervise(report, tmp_path, print, (sys.executable, str(script)))
    assert report.data["complete"] is False
    assert not running(int(pid.read_text()))
    assert os.path.exists(tmp_path / "gpu.json")
