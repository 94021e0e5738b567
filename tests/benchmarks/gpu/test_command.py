"""The command, and what becomes of processes that are lost."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import supervisor
from benchmarks.gpu.report import Goal, Report
from benchmarks.gpu.status import EXIT_DEVICE_LOST
from benchmarks.gpu.supervisor import new_report, supervise
from tests.support.paths import ROOT

WORKER = """
import json, os, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from benchmarks.gpu.report import Report
from benchmarks.gpu.status import Status
report, folder = Report.read(Path(sys.argv[1])), Path(sys.argv[2])
count = folder / "starts"
starts = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(starts))
def at(name, subject, seconds=60.0):
    report.begin(name)
    Status(item=name, subject=subject, until=time.time() + seconds).write(folder)
assert os.environ["WANX_STRICT"] == "1"
{code}
"""


def supervised(tmp_path: Path, code: str, minutes: float = 5) -> tuple[Report, int, list[str]]:
    root = str(ROOT)
    file = tmp_path / "worker.py"
    file.write_text(WORKER.format(root=root, code=code))
    report = new_report(tmp_path / "gpu.json", minutes=minutes, only=["a"], quick=True)
    lines: list[str] = []
    found = supervise(report, tmp_path, lines.append, (sys.executable, str(file)))
    return found, int((tmp_path / "starts").read_text()), lines


def test_a_crash_costs_one_subject(tmp_path: Path) -> None:
    code = (
        "if starts == 1:\n"
        "    report.begin('first'); report.end('measured', 1.0)\n"
        "    at('step', 'ours'); os.kill(os.getpid(), 11)\n"
        "assert report.data['crashes']; at('step', 'theirs')\n"
        "report.end('measured', 1.0); report.finish()\n"
    )
    report, starts, lines = supervised(tmp_path, code)
    assert starts == 2
    assert report.data["complete"] is True
    assert report.data["crashes"] == {"step/ours": "the process was lost: signal SIGSEGV"}
    assert [(i["name"], i["status"]) for i in report.items] == [
        *(("first", "measured"), ("step", "measured")),
    ]
    assert lines == ["   the process was lost: signal SIGSEGV"]
    assert report.data["command"].endswith("--minutes 5 --only a --quick")


def test_what_hangs_is_ended(tmp_path: Path) -> None:
    code = "if starts == 1:\n    at('step', None, 0.1); time.sleep(60)\nreport.finish()\n"
    report, starts, _ = supervised(tmp_path, code)
    assert starts == 2
    assert report.items[0]["reason"] == "it did not come to an end"


def test_the_end_is_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "MARGIN", 0.0)
    report, starts, _ = supervised(tmp_path, "at('step', 'ours'); time.sleep(60)", minutes=0.02)
    assert starts == 1
    assert report.data["complete"] is False
    assert report.items[0]["reason"] == "the time was over"
    assert report.data["crashes"] == {}


def test_a_worker_that_cannot_start_is_not_tried_again(tmp_path: Path) -> None:
    report, starts, lines = supervised(tmp_path, f"sys.exit({EXIT_DEVICE_LOST})")
    assert (starts, report.items, report.data["complete"]) == (1, [], False)
    assert lines == ["   the process was lost: the GPU does not answer"]


def test_crashes_come_to_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "MAX_RESTARTS", 2)
    report, starts, _ = supervised(tmp_path, "at('step', str(starts)); sys.exit(3)")
    assert starts == 3
    assert report.data["crashes"].keys() == {"step/1", "step/2", "step/3"}
    assert report.data["crashes"]["step/1"] == "the process was lost: exit code 3"


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ending:
        command.main()
    assert isinstance(ending.value.code, int)
    return ending.value.code


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "gpu.json"
    assert run_command(monkeypatch, "-o", str(output)) == 4
    captured = capsys.readouterr()
    assert captured.err.startswith("error: these measurements need an NVIDIA GPU")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "convolutions"], "nothing called convolutions"),
        (["--minutes", "0"], "--minutes is 0"),
        (["--minutes", "nan"], "--minutes is nan"),
        (["-o", "/no/such/folder/gpu.json"], "cannot write /no/such/folder/gpu.json: No such"),
    ],
)
def test_bad_arguments(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert run_command(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(report: Report, folder: Path, tell: Callable[[str], None], jobs: Any) -> Report:
        assert jobs[0].name == "tiny-aoti"
        report.begin("one")
        report.add(Goal.at_least("enough", 1.0, 0.5))
        report.end("measured", 1.0)
        report.begin("two", "skipped", "no time")
        return report

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "supervise", measured)
    output = tmp_path / "gpu.json"
    assert run_command(monkeypatch, "-o", str(output), "--minutes", "2") == 0
    line = f"1 measured, 1 skipped; 1 of 1 goals met; incomplete; {output}"
    *table, last = capsys.readouterr().out.splitlines()
    assert last == line
    assert [row.split()[:2] for row in table[1:]] == [["one", "measured"], ["two", "skipped"]]
    assert table[2].endswith("no time")

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "supervise", stopped)
    assert run_command(monkeypatch, "-o", str(output)) == 130
    assert "holds what was measured" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    report = command.run(output, minutes=2, only=["kernels-1.3B-rms"], quick=False)
    assert report.data["complete"] is True
    assert report.data["crashes"] == {}
    assert report.items[0]["name"] == "ceilings"
    for record in report.items:
        assert record["status"] == "measured", record
        assert all("error" not in row for row in record["rows"]), record
