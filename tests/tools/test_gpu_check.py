"""The table of what ran on a GPU, from what pytest writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gpu_check
import pytest
import torch
from rich.console import Console

from tests.support.paths import ROOT

TESTS = """
import pytest

def test_numbers(record_property):
    record_property("cosine", 0.9994)

def test_silent():
    pass

def test_wrong():
    assert 1 == 2, "one is not two"

def test_left_out():
    pytest.skip("no such thing here")
"""


def test_the_table(tmp_path: Path) -> None:
    (tmp_path / "test_sample.py").write_text(TESTS)
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", str(tmp_path)]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    found = {r.name.rpartition(" ")[2]: r for r in gpu_check.results(report)}
    assert found["test_numbers"].numbers == "cosine 0.9994"
    outcomes = {name: result.outcome for name, result in found.items()}
    assert outcomes == {
        "test_numbers": "passed", "test_silent": "passed", "test_wrong": "failed",
        "test_left_out": "skipped",
    }  # fmt: skip
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(gpu_check.table(list(found.values())))
    text = console.export_text()
    for word in ("cosine 0.9994", "one is not two", "no such thing here", "1 others"):
        assert word in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "gpu_check.py")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 4
    assert done.stderr.count("\n") == 1


def test_the_question_to_tensorrt_is_a_program() -> None:
    compile(gpu_check.RTX, "<rtx>", "exec")
