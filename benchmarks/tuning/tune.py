"""Tuning: the fastest meta-parameters and backends on this GPU, written to the table.

    python -m benchmarks.tuning.tune --op attention -o tuned.json

measures the ops that are named, or all, at Wan's sizes. What fails to compile or to launch, or
whose result differs, is dropped; the rest runs in turn for some rounds, and the best median wins.
New entries replace those of the file that is written, or of the package's own table where there is
no such file yet; it is written after each op.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.tuning.workloads import BACKEND_BITS, OPS, RANKED, Candidate, Workload, workloads
from wanx.errors import EnvironmentMismatchError, UsageError, WanxError
from wanx.kernels.launch import PROGRAMS_HAVE_TMA, sm_of
from wanx.kernels.launch_config import (
    TABLE,
    Choice,
    Entry,
    dump_table,
    load_table,
    merge_entries,
    set_table,
)
from wanx.kernels.tensor_metrics import Difference
from wanx.kernels.timing import ROUNDS, as_graph, interleaved

# Seconds of each call, round by round.
Timer = Callable[[Sequence[Callable[[], object]]], list[list[float]]]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of measuring the candidates.

    Attributes:
        microseconds: the median of each one that is right, by name, the fastest first.
        dropped: why the others are not among them, by name.
        first: the candidate that the others were compared with.
    """

    microseconds: dict[str, float]
    dropped: dict[str, str]
    first: str


def measure(
    candidates: Sequence[Candidate], tolerance: float, timer: Timer, deadline: float = math.inf
) -> Outcome:
    """Drop what fails or differs, and time the rest in turn.

    Args:
        candidates: the first one has the right result; where it fails, nothing is timed.
        tolerance: by how much results may differ from it, in relative RMS.
        timer: times calls.
        deadline: when no further candidate is tried, by :func:`time.monotonic`.
    """
    valid: list[Candidate] = []
    dropped: dict[str, str] = {}
    reference: list[Tensor] = []
    for candidate in candidates:
        if reference and time.monotonic() > deadline:
            dropped[candidate.name] = "no time was left to try it"
            continue
        try:
            result = tree_leaves(candidate.call())
        except _failures() as error:
            text = str(error).strip()
            dropped[candidate.name] = text.splitlines()[0] if text else type(error).__name__
            if candidate is candidates[0]:
                return Outcome(microseconds={}, dropped=dropped, first=candidate.name)
            continue
        reference = reference or result
        error = max(map(_relative_error, result, reference))
        if error <= tolerance:
            valid.append(candidate)
        else:
            dropped[candidate.name] = f"its result differs by {error:.2g}"
    seconds = timer([candidate.call for candidate in valid])
    medians = {
        candidate.name: 1e6 * statistics.median(taken)
        for candidate, taken in zip(valid, seconds, strict=True)
    }
    fastest = dict(sorted(medians.items(), key=lambda item: item[1]))
    return Outcome(microseconds=fastest, dropped=dropped, first=candidates[0].name)


def _failures() -> tuple[type[Exception], ...]:
    """Exceptions of a kernel that does not compile, or asks for more than the GPU has."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return (RuntimeError,)
    return RuntimeError, TritonError


def _relative_error(result: Tensor, reference: Tensor) -> float:
    """Relative RMS of the difference; infinite where a number is not finite."""
    relative = Difference.of(result, reference).relative_rms
    return relative if math.isfinite(relative) else math.inf


def tune(
    workload: Workload,
    sm: int,
    machine: dict[str, str],
    timer: Timer,
    deadline: float = math.inf,
) -> tuple[str, Entry | None]:
    """Measure one workload.

    Args:
        workload: an op at one shape.
        sm: the GPU, such as 90.
        machine: its name and the versions of what compiles for it.
        timer: times calls.
        deadline: see :func:`measure`.

    Returns:
        A report, and the entry for the table; None where nothing runs.
    """
    candidates = workload.prepare()
    shape = " ".join(f"{name}={size}" for name, size in workload.shape.items())
    title = f"{workload.op}, {shape}"
    if not candidates:
        return f"{title}: nothing runs", None
    outcome = measure(candidates, workload.tolerance, timer, deadline)
    lines = [f"  dropped {name}: {reason}" for name, reason in outcome.dropped.items()]
    if not outcome.microseconds:
        return "\n".join([f"{title}: left as it is", *lines]), None
    times = {name: round(taken, 1) for name, taken in outcome.microseconds.items()}
    choices = {candidate.name: candidate.choice for candidate in candidates}
    # What the table says is what programs run.
    compiled = [name for name in times if PROGRAMS_HAVE_TMA or not choices[name].get("TMA")]
    fastest, best, first = next(iter(times)), (compiled or list(times))[0], outcome.first
    if best != fastest:
        lines.append(f"  {fastest} takes {times[fastest]} us; programs need PyTorch 2.12 for it")
    if workload.op in RANKED:
        choice: Choice = list(times)
    else:
        choice = choices[best]
        times = {name: times[name] for name in (best, first)}
    report = f"{title}: {best} in {times[best]} us; {first} takes {times[first]} us"
    measured: dict[str, Any] = {**machine, "us": times}
    entry = Entry(op=workload.op, sm=sm, shape=workload.shape, choice=choice, measured=measured)
    return "\n".join([report, *lines]), entry


def _time_on_gpu(
    calls: Sequence[Callable[[], object]], device: torch.device, rounds: int, graphs: bool
) -> list[list[float]]:
    """Time calls on a GPU, without the time that Python takes to launch them if ``graphs``."""
    if graphs:
        # Graphs that run one after the other can share their memory.
        pool = torch.cuda.graph_pool_handle()
        calls = [as_graph(call, pool=pool) for call in calls]
    return interleaved(calls, device, rounds=rounds)


def run(ops: Sequence[str], output: Path, rounds: int) -> None:
    """Measure ops on the current GPU and write the table.

    Raises:
        UsageError: an op is not known.
        EnvironmentMismatchError: there is no GPU.
    """
    if unknown := [op for op in ops if op not in OPS]:
        raise UsageError(f"there is no op {unknown[0]} to tune; known are {', '.join(OPS)}")
    if not torch.cuda.is_available():
        raise EnvironmentMismatchError(
            "tuning needs an NVIDIA GPU, and PyTorch finds none here: run it where kernels will run"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    sm = sm_of(torch.empty(0, device=device))
    table = load_table(output if output.exists() else TABLE)
    timer_of = partial(gpu_timer, device=device, rounds=rounds)
    tune_ops(table, ops, output, sm, gpu_versions(device), device, timer_of)


def gpu_versions(device: torch.device) -> dict[str, str]:
    """A GPU's name, and the versions of what compiles for it."""
    import triton

    return {
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def gpu_timer(op: str, device: torch.device, rounds: int = ROUNDS) -> Timer:
    """Make the timer of an op's candidates on a GPU."""
    # Backends synchronise as they like, and keep what they plan at their first call.
    return partial(_time_on_gpu, device=device, rounds=rounds, graphs=op not in BACKEND_BITS)


def tune_ops(
    table: list[Entry],
    ops: Sequence[str],
    output: Path,
    sm: int,
    machine: dict[str, str],
    device: torch.device,
    timer_of: Callable[[str], Timer],
) -> None:
    """Measure ops, and write the table with the new entries after each; arguments as of others."""
    for op in ops:
        timer = timer_of(op)
        for workload in workloads(op, device):
            report, entry = tune(workload, sm, machine, timer)
            print(report, flush=True)
            table = merge_entries(table, [entry] if entry else [])
        dump_table(table, output)
        # So that backends run with what their kernels run best with.
        set_table(table)


def main() -> None:
    """Parse, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", action="append", help="one to measure; repeat for several")
    parser.add_argument("-o", "--output", type=Path, default=TABLE, help="the package's own table")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"{ROUNDS} unless given")
    arguments = parser.parse_args()
    try:
        run(arguments.op or OPS, arguments.output, arguments.rounds)
    except WanxError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
