"""The project's tests on a GPU, some of which end or stop the process that runs them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks.gpu import pytest_suites
from benchmarks.gpu.context import BenchContext
from benchmarks.gpu.pytest_suites import run_suite
from tests.support.gpu_bench import run_one, tiny_bench

SUITE = """
import os, time
import pytest

def test_numbers(record_property):
    record_property("cosine", 0.9994)

def test_aborts():
    os.abort()

def test_wrong():
    assert 1 == 2, "one is not two"

def test_hangs():
    time.sleep(600)

def test_left_out():
    pytest.skip("no such thing here")

def test_silent():
    pass
"""


@pytest.fixture
def bench(tmp_path: Path) -> BenchContext:
    return tiny_bench(tmp_path)


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    folder = tmp_path / "suite"
    folder.mkdir()
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_sample.py").write_text(SUITE)
    return folder


def test_what_crashes_hangs_or_fails_costs_one_test(
    bench: BenchContext, suite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytest_suites, "SILENCE", 6.0)
    (suite / "test_broken.py").write_text("import no_such_package\n")
    record = run_one(bench, lambda b: run_suite(b, "planted", ["."], suite))
    rows = {row["what"].rpartition(":")[2]: row for row in record["rows"]}
    assert rows["test_numbers"]["numerics"] == {"cosine": 0.9994}
    errors = {name: row["error"] for name, row in rows.items() if "error" in row}
    assert errors.keys() == {"test_aborts", "test_wrong", "test_hangs", "test_broken.py"}
    assert errors["test_aborts"].startswith("signal SIGABRT")
    assert "one is not two" in errors["test_wrong"]
    assert errors["test_hangs"] == "it did not come to an end within 6 s"
    assert "no_such_package" in errors["test_broken.py"]
    whole = rows["tests, planted"]
    assert whole["numerics"] == {"passed": 2, "failed": 4, "skipped": 1}
    assert whole["all_ran"] is True
    assert any("no such thing here" in reason for reason in whole["skipped_because"])
    assert record["goals"][0]["met"] is False


def test_the_time_is_kept(bench: BenchContext, suite: Path) -> None:
    """What has run is told, and run no more when there is time again."""
    (suite / "test_sample.py").write_text(
        "import time\n\ndef test_a(): pass\n\ndef test_b():\n    time.sleep(600)\n"
    )
    start = time.time()
    bench.deadline = start + pytest_suites.RESERVE + 12
    record = run_one(bench, lambda b: run_suite(b, "planted", ["."], suite))
    assert time.time() < start + 120  # of the 600 s that a test sleeps
    assert record["rows"][-1]["numerics"] == {"passed": 1, "failed": 0, "skipped": 0}
    assert record["rows"][-1]["all_ran"] is False
    (suite / "test_sample.py").write_text("def test_a(): assert False\n\ndef test_b(): pass\n")
    bench.deadline = time.time() + 60
    record = run_one(bench, lambda b: run_suite(b, "planted", ["."], suite))
    assert record["rows"][-1]["numerics"] == {"passed": 2, "failed": 0, "skipped": 0}
    assert record["rows"][-1]["all_ran"] is True


def test_without_pytest(bench: BenchContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest_suites, "find_spec", lambda name: None)
    record = run_one(bench, lambda b: run_suite(b, "kernels"))
    assert [row["error"] for row in record["rows"]] == ["pytest is not installed"]
