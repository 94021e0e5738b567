"""Interleaved timing; short calls repeat in a CUDA graph until 5 ms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from benchmarks.gpu.context import BenchContext, one_line
from benchmarks.gpu.report import Times
from wanx.kernels.timing import as_graph, interleaved

Call = Callable[[], object]
LEAST_SECONDS = 0.005  # of a round; events resolve microseconds, and a launch takes some itself
MOST_REPEATS = 64
ROUNDS = (3, 15)


def time_interleaved(
    bench: BenchContext, calls: Mapping[str, Call], *, short: bool = False
) -> dict[str, Times]:
    """Time calls that have run once already.

    Args:
        bench: where, and how long this may take.
        calls: by name.
        short: they are short kernels; on a GPU, several calls of each become one graph, which
            leaves out the time that Python takes to launch them.
    """
    if not calls:
        return {}
    once = interleaved(list(calls.values()), bench.device, rounds=1, warm_ups=0)
    singles = [taken[0] for taken in once]
    repeated: list[Call] = []
    repeats: list[int] = []
    notes: list[str | None] = []
    for call, single in zip(calls.values(), singles, strict=True):
        count, note = 1, None
        if short and bench.device.type == "cuda":
            count = min(max(math.ceil(LEAST_SECONDS / single), 1), MOST_REPEATS)
            try:
                call = as_graph(call, count)
            except RuntimeError as error:
                count, note = 1, f"no graph: {one_line(error)}"
        repeated.append(call)
        repeats.append(count)
        notes.append(note)
    lap = sum(single * count for single, count in zip(singles, repeats, strict=True))
    least, most = ROUNDS
    rounds = min(max(int(bench.seconds_per_comparison / max(lap, 1e-9)), least), most)
    seconds = interleaved(repeated, bench.device, rounds=rounds, warm_ups=int(short))
    return {
        name: Times(seconds=tuple(s / count for s in taken), calls=count, note=note)
        for name, taken, count, note in zip(calls, seconds, repeats, notes, strict=True)
    }
