"""The steps to compute for a saving, with the least predicted error."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

Cost = Callable[[int, int, int | None], float]
MAX_GAP = 8  # steps in a row that are skipped


def best_steps(cost: Cost, forwards: Sequence[int], budget: int) -> tuple[tuple[int, ...], float]:
    """Steps to compute, by dynamic programming over the last two of them.

    What a skipped step costs depends on the last two computed steps alone, so the best schedule
    that ends with a pair of steps and so many forwards is found from the best ones that end with
    the first of the pair; every schedule is among them.

    Args:
        cost: of skipping a step, given the last computed step and the one before that, if any;
            costs add up.
        forwards: of the network at each step. The first is computed; steps of none are free.
        budget: most forwards.

    Returns:
        The steps, ascending, and their cost; a cost of infinity where no schedule has so few
        forwards.
    """
    last = len(forwards)
    # By the last step: {(the step before it, forwards so far): (cost, steps)}.
    open_at: list[dict[tuple[int | None, int], tuple[float, tuple[int, ...]]]]
    open_at = [{} for _ in forwards]
    if forwards[0] <= budget:
        open_at[0][None, forwards[0]] = 0.0, (0,)
    best: tuple[tuple[int, ...], float] = (), math.inf
    for step, states in enumerate(open_at):
        for (before, used), (spent, steps) in states.items():
            skipped = 0.0
            for after in range(step + 1, min(step + MAX_GAP + 1, last) + 1):
                total = spent + skipped
                if after == last:
                    if total < best[1]:
                        best = steps, total
                    break
                count = used + forwards[after]
                known = open_at[after].get((step, count))
                if count <= budget and (known is None or total < known[0]):
                    open_at[after][step, count] = total, (*steps, after)
                skipped += cost(after, step, before)
    return best


def fewest_forwards(forwards: Sequence[int], required: Collection[int] = ()) -> int:
    """Forwards of the schedule with the fewest; ``required`` steps are computed in each."""
    count, used, earliest = len(forwards), {0: forwards[0]}, 0
    for step in range(1, count + 1):
        reached = [used[before] for before in range(max(earliest, step - MAX_GAP - 1), step)]
        used[step] = min(reached) + (forwards[step] if step < count else 0)
        if step in required:
            earliest = step
    return used[count]
