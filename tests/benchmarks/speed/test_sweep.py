"""Growth with the number of tokens: the fit against known factors, and a prediction that holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from types import SimpleNamespace

import numpy as np
import pytest

from wanx.benchmarks.speed import sweep as module
from wanx.benchmarks.speed.feeds import dit_feeds
from wanx.benchmarks.speed.sweep import Point, default_sizes, fit, leave_one_out, sweep
from wanx.builtin import find_bundle
from wanx.bundle.reader import Bundle, open_bundle
from wanx.errors import UsageError
from wanx.runtime.sessions import open_session


@pytest.fixture(scope="module")
def tiny() -> Bundle:
    return open_bundle(find_bundle("tiny"), allow_hard_links=True)


def test_a_fit_finds_the_factors_of_exact_times() -> None:
    tokens = [100, 300, 1000, 5000]
    found = fit(tokens, [2e-5 * n + 3e-9 * n**2 for n in tokens])
    assert found.linear == pytest.approx(2e-5)
    assert found.quadratic == pytest.approx(3e-9)
    assert found.seconds(75_600) == pytest.approx(2e-5 * 75_600 + 3e-9 * 75_600**2)
    assert found.crossover == pytest.approx(2e-5 / 3e-9)


def test_a_fit_is_the_least_squares_of_relative_errors() -> None:
    draw = np.random.default_rng(0)
    tokens = np.array([100, 300, 1000, 5000])
    seconds = (2e-5 * tokens + 3e-9 * tokens**2) * draw.uniform(0.9, 1.1, 4)
    found = fit(list(tokens), list(seconds))

    def error(linear: float, quadratic: float) -> float:
        return float((((linear * tokens + quadratic * tokens**2) / seconds - 1) ** 2).sum())

    best = error(found.linear, found.quadratic)
    for a, b in ((1.01, 1), (0.99, 1), (1, 1.01), (1, 0.99)):
        assert error(found.linear * a, found.quadratic * b) > best


@pytest.mark.parametrize("power", [0.5, 2.5])
def test_no_factor_is_negative(power: float) -> None:
    found = fit([100, 200, 400], [n**power for n in (100, 200, 400)])
    assert min(found.linear, found.quadratic) == 0 < max(found.linear, found.quadratic)


def test_what_one_number_of_tokens_says_is_nothing() -> None:
    with pytest.raises(UsageError, match="sweep 2 or more"):
        fit([100, 100], [1.0, 1.1])


def test_every_point_is_predicted_by_the_others() -> None:
    points = [Point(label="", tokens=n, seconds=(float(n),)) for n in (1, 2, 4)]
    wrong = [*points, Point(label="", tokens=8, seconds=(80.0,))]
    assert [p.unseen for p in leave_one_out(points)] == pytest.approx([1, 2, 4])
    assert leave_one_out(wrong)[-1].unseen == pytest.approx(8)
    assert leave_one_out(points[:2])[0].unseen is None


SIZES = [(256, 256, frames) for frames in (5, 9, 13, 21)]
LENGTHS = [512, 768, 1024, 1536]


def exact_seconds(tokens: int) -> float:
    return 2e-5 * tokens + 3e-9 * tokens**2


class TimedSession:
    """A denoiser on a clock of its own, whose first run at a length takes ten times as long."""

    def __init__(self) -> None:
        self.now = 0.0
        self.lengths: set[int] = set()

    def __enter__(self) -> TimedSession:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def bind(self, constants: Mapping[str, np.ndarray]) -> None:
        self.now += 100

    def run_each(self, feeds: Sequence[Mapping[str, np.ndarray]]) -> None:
        for feed in feeds:
            length = feed["tokens"].shape[1]
            self.now += exact_seconds(length) * (1 if length in self.lengths else 10)
            self.lengths.add(length)


@pytest.mark.parametrize("branches", [1, 2])
def test_a_prediction_holds(tiny: Bundle, branches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A size in the middle and the largest, each from the others."""
    session = TimedSession()
    monkeypatch.setattr(module, "open_session", lambda *_, **__: session)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: session.now))
    found = sweep(tiny, SIZES, branches=branches, predict=[(256, 256, 13), (256, 256, 29)])
    assert [point.tokens for point in found.points] == LENGTHS
    for point in found.points:
        exact = pytest.approx(branches * exact_seconds(point.tokens))
        assert median(point.seconds) == exact
        assert point.unseen == exact
    (unmeasured,) = found.predictions
    assert unmeasured.label == "256x256, 29 frames"
    assert unmeasured.seconds == pytest.approx(branches * exact_seconds(2048))


def test_steps_are_timed_by_the_clock(tiny: Bundle) -> None:
    start = time.perf_counter()
    found = sweep(tiny, SIZES, branches=1, predict=[(256, 256, 29)])
    passed = time.perf_counter() - start
    assert [point.tokens for point in found.points] == LENGTHS
    assert all(seconds > 0 for point in found.points for seconds in point.seconds)
    assert sum(sum(point.seconds) for point in found.points) < passed
    (unmeasured,) = found.predictions
    assert 0 < unmeasured.seconds == pytest.approx(found.fit.seconds(2048))


def test_a_sweep_needs_sizes_that_differ(tiny: Bundle) -> None:
    with pytest.raises(UsageError, match="these sizes have 2"):
        sweep(tiny, [(64, 64, 5), (64, 64, 17), (32, 128, 5)])
    assert [n for _, _, n in default_sizes(tiny, 64, 64, 17)] == [5, 9, 13, 17]
    assert [n for _, _, n in default_sizes(tiny, 832, 480, 81)] == [21, 41, 61, 81]


@pytest.mark.parametrize("task", ["t2v", "i2v", "flf2v", "vace"])
def test_every_transformer_takes_its_feeds(
    bundle_of: Callable[[str, str], Bundle], task: str
) -> None:
    bundle = bundle_of(task, "fp32")
    feeds = dit_feeds(bundle.manifest.config, (2, 3, 4))
    with open_session(bundle, "dit") as session:
        session.bind(feeds.constants)
        answers = session.run_each(feeds.branches)
    assert [answer["velocity"].shape[1] for answer in answers] == [24, 24]
    assert not np.array_equal(answers[0]["velocity"], answers[1]["velocity"])
