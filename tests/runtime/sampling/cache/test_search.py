"""The search for the steps to compute, against all schedules that there are."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import pytest

from wanx.runtime.sampling.cache import search
from wanx.runtime.sampling.cache.search import Cost, best_steps, fewest_forwards


def random_cost(seed: int) -> Cost:
    draw = random.Random(seed)
    known: dict[tuple[int, int, int | None], float] = {}
    return lambda *key: known.setdefault(key, draw.random() * (key[0] - key[1]))


def cost_of(steps: Sequence[int], count: int, cost: Cost) -> float:
    total = 0.0
    for step in range(count):
        if step not in steps:
            *others, last = [known for known in steps if known < step]
            total += cost(step, last, others[-1] if others else None)
    return total


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", [3, 6, 9])
def test_nothing_is_better(seed: int, budget: int) -> None:
    count, cost = 9, random_cost(seed)
    forwards = random.Random(seed).choices([1, 2], k=count)
    found, error = best_steps(cost, forwards, budget)
    everything = (
        (0, *rest)
        for size in range(count)
        for rest in itertools.combinations(range(1, count), size)
        if sum(forwards[i] for i in (0, *rest)) <= budget
    )
    best = min(everything, key=lambda steps: cost_of(steps, count, cost), default=())
    assert error == pytest.approx(cost_of(best, count, cost) if best else math.inf)
    if best:
        assert cost_of(found, count, cost) == pytest.approx(error)
        assert sum(forwards[step] for step in found) <= budget


def test_gaps_have_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "MAX_GAP", 2)
    steps, error = best_steps(lambda *_: 1.0, [1] * 10, 4)
    assert len(steps) == 4
    assert error == 6.0
    assert max(b - a for a, b in itertools.pairwise((*steps, 10))) <= 3
    assert best_steps(lambda *_: 1.0, [1] * 10, 3) == ((), math.inf)
    assert fewest_forwards([1] * 10) == 4


@pytest.mark.parametrize(("forwards", "fewest"), [([2] * 20, 6), ([1] * 8, 1), ([2, 1, 1], 2)])
def test_fewest_forwards(forwards: list[int], fewest: int) -> None:
    assert fewest_forwards(forwards) == fewest
    assert best_steps(lambda *_: 0.0, forwards, fewest)[0]
    assert best_steps(lambda *_: 0.0, forwards, fewest - 1) == ((), math.inf)


def test_steps_of_one_branch_are_cheaper() -> None:
    """Where a step of one forward costs as much as one of two, those of one are computed."""
    steps, _ = best_steps(lambda *_: 1.0, [2, 2, 2, 1, 1, 1], 5)
    assert steps == (0, 3, 4, 5)


@pytest.mark.parametrize("required", [[3], [1, 2, 3], [10], [5, 15]])
def test_required_steps(required: list[int]) -> None:
    forwards = [1] * 20

    def cost(step: int, *_: object) -> float:
        return math.inf if step in required else 1.0

    fewest = fewest_forwards(forwards, required)
    steps, error = best_steps(cost, forwards, fewest)
    assert math.isfinite(error)
    assert set(required) <= set(steps)
    assert best_steps(cost, forwards, fewest - 1)[1] == math.inf
