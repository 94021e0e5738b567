"""Interleaved timing: calls that are compared run in turn, round by round, so drift hits all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

ROUNDS = 7


def interleaved(
    calls: Sequence[Callable[[], object]],
    device: torch.device,
    *,
    rounds: int = ROUNDS,
    warm_ups: int = 2,
    pause: float = 0.0,
) -> list[list[float]]:
    """Seconds that each call took, round by round.

    Args:
        calls: what to time; on a GPU it may return before it is done.
        device: where it runs.
        rounds: how often each is timed.
        warm_ups: how often each is run before.
        pause: seconds before each call, in which the threads of the one before stop spinning.
    """
    for _ in range(warm_ups):
        for call in calls:
            time.sleep(pause)
            call()
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for taken, call in zip(seconds, calls, strict=True):
            time.sleep(pause)
            taken.append(_timed(call, device))
    return seconds


def medians(seconds: Sequence[Sequence[float]]) -> list[float]:
    """The median of each call's rounds."""
    return [statistics.median(taken) for taken in seconds]


def as_graph(
    call: Callable[[], object], repeats: int = 1, pool: Any = None
) -> Callable[[], object]:
    """Capture calls in a CUDA graph, which leaves out the time that Python takes to launch them.

    Args:
        call: what runs on the current GPU; it has run before.
        repeats: calls in the graph.
        pool: memory that graphs share which run one after the other.

    Returns:
        Launches the graph.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for _ in range(repeats):
            call()
    return graph.replay


def _timed(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000
