"""Figures that are read off trials, against arithmetic by hand and numpy."""

import numpy as np
import pytest

from tests.support.speed_results import CASE, results, trial
from wanx.benchmarks.speed.metrics import METRICS, amount, by_round, peak_bytes, speedup, spread

BY_NAME = {metric.name: metric for metric in METRICS}


def test_every_part_of_a_trial_is_in_one_figure_and_they_add_up() -> None:
    made = trial(0, 0, [3.0, 1.0, 2.0])
    value = {name: metric.value(made, CASE, 1) for name, metric in BY_NAME.items()}
    assert value["step"] == 1.5
    assert value["first step"] == 3.0
    assert value["condition"] is None
    assert value["decode, a frame"] == pytest.approx(0.2 / 5)
    parts = ("cold start", "model load", "text encode", "video write")
    total = sum(value[name] or 0 for name in parts) + 6.0 + 0.2
    assert value["end to end"] == pytest.approx(total)


def test_a_step_is_spread_over_all_steps_of_all_rounds_but_the_warm_up() -> None:
    found = results(trial(0, 0, [9, 1, 2]), trial(0, 1, [9, 3, 8]))
    steps = spread(found, BY_NAME["step"], 0, 0)
    assert steps is not None
    p10, median, p90 = np.percentile([1, 2, 3, 8], [10, 50, 90])
    assert (steps.p10, steps.median, steps.p90, steps.count) == (p10, median, p90, 4)
    first = spread(found, BY_NAME["first step"], 0, 0)
    assert first is not None
    assert (first.median, first.count) == (9, 2)


def test_ratios_are_of_runs_of_one_round() -> None:
    # The machine was half as fast in the second round; medians over rounds would say 1.5.
    found = results(
        trial(0, 0, [1, 2, 2]), trial(1, 0, [1, 1, 1]),
        trial(1, 1, [1, 2, 2]), trial(0, 1, [1, 4, 4]),
        trial(0, 2, [1, 9, 9]),  # the other one failed
        labels=("old", "new"),
    )  # fmt: skip
    ratio = speedup(found, BY_NAME["step"], 1, 0)
    assert ratio is not None
    assert (ratio.median, ratio.p10, ratio.p90, ratio.count) == (2, 2, 2, 2)
    assert by_round(found, BY_NAME["step"], 0, 0) == {0: 2, 1: 4, 2: 9}


def test_without_trials_there_is_no_figure() -> None:
    found = results(labels=("old", "new"))
    assert spread(found, BY_NAME["step"], 0, 0) is None
    assert speedup(found, BY_NAME["step"], 1, 0) is None
    assert peak_bytes(found, 0, 0) == {}


def test_peaks_are_the_largest_of_any_round() -> None:
    found = results(trial(0, 0, [1, 1]), trial(0, 1, [1, 1]))
    assert peak_bytes(found, 0, 0) == {"text": 10**9, "denoise": 10**9, "decode": 10**9}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1234.5, "1,234 s"), (99.97, "100 s"), (12.34, "12.3 s"), (1.0, "1.00 s"),
        (0.9996, "1,000 ms"), (0.0123, "12.3 ms"), (0.00123, "1.23 ms"), (1.2e-5, "12.0 µs"),
        (0.0, "0.00 µs"), (None, "–"), (float("nan"), "–"),
    ],
)  # fmt: skip
def test_amounts_have_three_digits(seconds: float | None, text: str) -> None:
    assert amount(seconds) == text
