"""Peaks of real processes stay below what was said, and that below the budget."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.paths import ROOT
from wanx.bundle.reader import Bundle
from wanx.runtime.peak_rss import peak_bytes

pytestmark = pytest.mark.skipif(peak_bytes() is None, reason="the system tells no peaks")
SIZE = ("--size", "768x768", "--frames", "5", "--provider", "cpu")


def measure(bundle: Bundle, memory: list[str]) -> list[dict[str, float]]:
    command = [sys.executable, "-m", "benchmarks.vae", str(bundle.root), *SIZE, "--memory", *memory]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=ROOT)
    rows: list[dict[str, float]] = json.loads(done.stdout)["rows"]
    return rows


def test_five_budgets(bundle_fp32: Bundle) -> None:
    budgets = [380, 440, 520, 600, 700]
    rows = measure(bundle_fp32, [f"{budget}M" for budget in budgets] + ["none"])
    for budget, row in zip(budgets, rows, strict=False):
        assert row["peak_gb"] <= row["predicted_gb"] <= budget * (1 << 20) / 1e9, row
    assert [row["tiles"] for row in rows] == sorted((row["tiles"] for row in rows), reverse=True)
    assert rows[-1]["tiles"] == 1
    assert rows[0]["peak_gb"] < rows[-1]["peak_gb"] / 2
    # What is said of whole frames is near what they take.
    assert 0.5 * rows[-1]["predicted_gb"] <= rows[-1]["peak_gb"] <= rows[-1]["predicted_gb"]
