"""Budget, report and table of the GPU benchmark, and items that fail."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import worker
from benchmarks.gpu.catalog import CEILINGS, PROGRAMS, all_items, selected
from benchmarks.gpu.context import BenchContext, DeviceLost, no_metrics, one_line
from benchmarks.gpu.report import HEAD, Goal, Measurement, Report, ReportItem, Times
from benchmarks.gpu.sizes import MODELS, SIZES
from benchmarks.gpu.status import Status
from benchmarks.gpu.supervisor import new_report, record_crash
from benchmarks.gpu.timing import time_interleaved
from benchmarks.gpu.worker import measure
from tests.support.gpu_bench import item, run_items, tiny_bench
from wanx.errors import UsageError

ROW = Measurement(
    operation="adaln",
    implementation="wanx",
    shape={"D": 1536, "L": 32760},
    times=Times(seconds=(0.002, 0.001, 0.003), calls=4),
    rate=4.2e12,
    unit="B/s",
    peak="copy",
    ceiling=4.8e12,
    speedup={"torch": 5.25},
    numerics={"cosine": 0.999999, "max_error": math.inf},
    details={"compiled": True, "nothing": None},
)


@pytest.fixture
def bench(tmp_path: Path) -> BenchContext:
    return tiny_bench(tmp_path)


def gives(*found: ReportItem) -> Callable[[BenchContext], Iterable[ReportItem]]:
    return lambda bench: found


def test_what_is_not_finite_is_text() -> None:
    """Strict JSON has neither NaN nor infinity, and which of them it was must not be lost."""
    record = json.loads(json.dumps(ROW.record(), allow_nan=False))
    assert record["numerics"]["max_error"] == "inf"
    assert Goal.at_least("enough", math.nan, 0.5).record()["value"] == "nan"


def test_a_row_in_the_table() -> None:
    line = ROW.line()
    assert line.split() == [
        *("adaln,", "D=1536", "L=32760", "wanx", "2.000", "4200", "GB/s", "0.88"),
        *("5.25x", "torch", "cosine", "1", "max_error", "inf"),
    ]
    assert line.index("wanx") == HEAD.index("by")
    assert line.index("5.25x") == HEAD.index("against")
    assert (
        Measurement(operation="o", implementation="fp8", error="no such GPU")
        .line()
        .split(maxsplit=2)[2]
        == "no such GPU"
    )
    assert (
        "3 TFLOP/s"
        in Measurement(operation="o", implementation="x", times=ROW.times, rate=3e12).line()
    )


@pytest.mark.parametrize(("value", "met"), [(0.85, True), (0.84, False), (None, False)])
def test_goals(value: float | None, met: bool) -> None:
    goal = Goal.at_least("enough", value, 0.85)
    assert goal.record() == {"goal": "enough", "value": value, "met": met}
    assert ("MISSED" in goal.line()) is not met
    assert Goal.at_most("little", math.nan, 1).met is False
    assert Goal.at_most("little", 1.0, 1).met is True


def test_items_fail_softly_and_each_is_kept(bench: BenchContext) -> None:
    bench.deadline = time.time() + 50

    def half(bench: BenchContext) -> Iterator[ReportItem]:
        yield ROW
        raise RuntimeError("out of memory\nand more")

    report, lines = run_items(
        bench,
        item("good", gives(ROW, Goal.at_least("enough", 1.0, 0.5))),
        item("half", half),
        item("long", gives(ROW), seconds=60),
        item("last", gives(ROW), seconds=10),
    )
    good, failed, skipped, last = report.items
    assert (good["status"], len(good["rows"]), good["goals"][0]["met"]) == ("measured", 1, True)
    assert (failed["status"], len(failed["rows"])) == ("failed", 1)
    assert failed["reason"] == "RuntimeError: out of memory"
    assert skipped["status"] == "skipped"
    assert skipped["reason"].startswith("it may take 60 s, and ")
    assert last["status"] == "measured"
    assert report.data["complete"] is False
    assert "-- long: skipped, it may take 60 s" in "\n".join(lines)
    assert "   failed: RuntimeError: out of memory" in lines


def test_the_file_is_whole_after_each_row(bench: BenchContext) -> None:
    seen: list[Any] = []

    def run(bench: BenchContext) -> Iterator[ReportItem]:
        for _ in range(3):
            seen.append(json.loads((bench.folder / "report.json").read_text()))
            yield ROW

    run_items(bench, item("one", run))
    assert [len(data["items"][0]["rows"]) for data in seen] == [0, 1, 2]
    assert all(data["items"][0]["status"] == "running" for data in seen)
    assert all(data["schema_version"] == 1 and data["complete"] is False for data in seen)


def test_another_process_goes_on(bench: BenchContext) -> None:
    ran: list[str] = []

    def run(bench: BenchContext) -> Iterator[ReportItem]:
        ran.append(bench.item)
        yield ROW

    report = Report(bench.folder / "report.json", {})
    ceiling = Measurement(operation="copy", implementation="torch", times=ROW.times, rate=7.0)
    measure(bench, [item(CEILINGS, gives(ceiling)), item("a", run)], report, lambda _: None)
    other = tiny_bench(bench.folder)
    again = Report.read(report.path)
    measure(other, [item(CEILINGS, run), item("a", run), item("b", run)], again, lambda _: None)
    assert ran == ["a", "b"]
    assert other.ceilings == {"copy": 7.0}
    assert [record["name"] for record in Report.read(report.path).items] == [CEILINGS, "a", "b"]


def test_what_ended_a_process_is_not_run_again(bench: BenchContext) -> None:
    bench.item, bench.crashed = "step", {"step/ours": "the process was lost: SIGSEGV"}
    assert bench.first_run("ours", pytest.fail, no_metrics).error == "the process was lost: SIGSEGV"
    noted: list[str | None] = []
    bench.note = noted.append
    run = bench.first_run("theirs", lambda: 3, lambda three: {"three": float(three)})
    assert (run.numerics, run.error, noted) == ({"three": 3.0}, None, ["theirs", None])
    assert one_line(ValueError()) == "ValueError"


def test_a_lost_device_stops_the_process(
    bench: BenchContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.gpu.context.usable", lambda device: False)

    def run(bench: BenchContext) -> Iterator[ReportItem]:
        def call() -> None:
            raise RuntimeError("an illegal memory access")

        bench.first_run("ours", call, no_metrics)
        yield ROW

    report = Report(bench.folder / "report.json", {})
    with pytest.raises(DeviceLost):
        measure(bench, [item("step", run)], report, lambda _: None)
    doing = Status.read(bench.folder)
    assert doing is not None
    assert (doing.item, doing.subject) == ("step", "ours")
    report = Report.read(report.path)
    record_crash(report, doing, "exit code 75")
    reason = "the process was lost: RuntimeError: an illegal memory access"
    assert report.data["crashes"] == {"step/ours": reason}
    assert report.items == []
    # The second time the item itself is given up.
    report.begin("step")
    record_crash(report, doing, "exit code 75")
    assert report.items[0]["reason"] == "RuntimeError: an illegal memory access"


def test_rounds_take_turns(bench: BenchContext) -> None:
    order: list[str] = []
    bench.seconds_per_comparison = 0.05
    calls = {"a": lambda: order.append("a"), "b": lambda: (order.append("b"), time.sleep(0.004))}
    times = time_interleaved(bench, calls)
    assert "".join(order) == "ab" * (1 + len(times["a"].seconds))
    assert 3 <= len(times["b"].seconds) <= 12
    assert times["b"].median > 0.004 > times["a"].median
    assert time_interleaved(bench, {}) == {}


def test_every_item_has_a_name_of_its_own() -> None:
    items = all_items(MODELS, SIZES)
    names = [item.name for item in items]
    assert len(set(names)) == len(names)
    assert names[:4] == ["numerics", PROGRAMS, "generation", CEILINGS]
    assert {"attention-14B-720P", "step-1.3B-480P", "linears-14B", "generation"} <= set(names)
    quick = [item.name for item in all_items(MODELS, SIZES[:1], quick=True)]
    assert set(quick) < set(names)
    assert all(name.count("720P") == 0 for name in quick)


def test_a_choice_brings_what_it_builds_on() -> None:
    items = all_items(MODELS, SIZES)
    chosen = [item.name for item in selected(items, ["step-1.3B", "kernels-14B-rms"])]
    assert chosen == [
        *(PROGRAMS, CEILINGS, "step-1.3B-480P"),
        *("kernels-14B-rms_norm", "kernels-14B-rms_norm_rope", "step-1.3B-720P"),
    ]
    assert [item.name for item in selected(items, ["linears-14B"])] == [CEILINGS, "linears-14B"]
    assert [item.name for item in selected(items, [])] == [item.name for item in items]
    with pytest.raises(
        UsageError, match="nothing called convolutions to measure; there are numerics,"
    ):
        selected(items, ["convolutions"])


def test_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = new_report(tmp_path / "gpu.json", minutes=1, only=["generation"], rehearsal=True)
    monkeypatch.setattr(worker, "machine", lambda device: {"gpu": "none"})
    monkeypatch.setattr(worker, "selected", lambda items, only: [item("a", gives(ROW))])
    monkeypatch.setattr(sys, "argv", ["worker", str(report.path), str(tmp_path)])
    worker.main()
    data = json.loads(report.path.read_text())
    assert data["complete"] is True
    assert data["machine"] == {"gpu": "none"}
    assert data["items"][0]["rows"][0]["what"] == "adaln"
