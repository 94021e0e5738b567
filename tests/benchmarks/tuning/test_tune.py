from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks.tuning.workloads as workloads_module
from benchmarks.tuning import tune
from benchmarks.tuning.tune import main, measure, run, tune_ops
from benchmarks.tuning.workloads import (
    GEMMS,
    GRIDS,
    LENGTHS,
    OPS,
    PRODUCTS,
    Candidate,
    Workload,
    grid,
    workloads,
)
from tests.support.interpreter import DEVICE
from wanx.errors import EnvironmentMismatchError, UsageError
from wanx.kernels import launch_config
from wanx.kernels.attention import backends
from wanx.kernels.launch_config import config, load_table
from wanx.kernels.timing import interleaved

CPU, MACHINE = torch.device("cpu"), {"gpu": "a GPU", "torch": "2", "triton": "3"}
RIGHT = torch.linspace(-1, 1, 100)


@pytest.fixture(autouse=True)
def _own_table() -> Iterator[None]:
    yield
    launch_config.set_table(load_table(launch_config.TABLE))


def candidate(name: str, result: Any = RIGHT) -> Candidate:
    def call() -> Any:
        if isinstance(result, Exception):
            raise result
        return result

    return Candidate(name=name, choice={"number": len(name)}, call=call)


def no_timer(calls: Sequence[Callable[[], object]]) -> list[list[float]]:
    return [[1e-6] for _ in calls]


def test_what_is_wrong_or_fails_is_dropped() -> None:
    nan = RIGHT.clone()
    nan[3] = torch.nan
    timed: list[Any] = []

    def timer(calls: Sequence[Callable[[], object]]) -> list[list[float]]:
        timed.extend(call() for call in calls)
        return [[3e-6], [1e-6]]

    outcome = measure(
        [
            candidate("first"), candidate("near", RIGHT * 1.005), candidate("off", RIGHT * 1.02),
            candidate("nan", nan), candidate("large", RuntimeError("out of\nresource")),
        ],
        0.01, timer,
    )  # fmt: skip
    assert outcome.microseconds == pytest.approx({"near": 1, "first": 3})
    assert list(outcome.microseconds) == ["near", "first"]
    assert outcome.dropped == {
        "off": "its result differs by 0.02",
        "nan": "its result differs by inf",
        "large": "out of",
    }
    assert len(timed) == 2


def test_every_result_of_several_is_compared() -> None:
    empty = torch.empty(0)
    outcome = measure(
        [candidate("first", (RIGHT, empty, RIGHT)), candidate("off", (RIGHT, empty, -RIGHT))],
        0.01, no_timer,
    )  # fmt: skip
    assert list(outcome.dropped) == ["off"]


def test_triton_s_errors_drop_a_candidate() -> None:
    errors = pytest.importorskip("triton.runtime.errors")
    large = errors.OutOfResources(300000, 232448, "shared memory")
    outcome = measure([candidate("first"), candidate("large", large)], 0.01, no_timer)
    assert "shared memory" in outcome.dropped["large"]


def test_other_errors_are_not_swallowed() -> None:
    with pytest.raises(KeyError):
        measure([candidate("first"), candidate("broken", KeyError())], 0.01, no_timer)


def test_nothing_is_timed_without_a_right_result() -> None:
    broken = candidate("first", RuntimeError())
    outcome = measure([broken, candidate("other")], 0.01, lambda _: pytest.fail("timed"))
    assert (outcome.microseconds, outcome.dropped) == ({}, {"first": "RuntimeError"})


def test_the_best_median_wins() -> None:
    rounds = {"steady": [3, 3, 3], "lucky": [1, 9, 9], "fast": [9, 2, 2]}
    outcome = measure([candidate(name) for name in rounds], 0, lambda _: list(rounds.values()))
    assert outcome.microseconds == {n: 1e6 * statistics.median(t) for n, t in rounds.items()}
    assert list(outcome.microseconds) == ["fast", "steady", "lucky"]


def test_candidates_run_in_turn() -> None:
    order: list[str] = []
    calls = [Candidate(name=n, choice={}, call=lambda n=n: order.append(n) or RIGHT) for n in "ab"]
    measure(calls, 0.01, lambda c: interleaved(c, CPU, rounds=3, warm_ups=0))
    assert order == [*"ab", *"ab" * 3]


def test_a_grid_begins_with_what_is_in_use() -> None:
    present = {"num_warps": 32}
    assert grid("quantize", present, 90)[0] == present
    assert len(grid("quantize", present, 90)) == 5
    assert grid("quantize", {"num_warps": 8}, 90) == [{"num_warps": n} for n in (8, 2, 4, 16)]


@pytest.mark.parametrize("op", ["attention", "attention_8bit"])
def test_gpus_are_offered_what_they_have(op: str) -> None:
    """TMA from Hopper on, where warps specialise in groups of 4."""

    def offered(sm: int) -> set[tuple[int, int, int]]:
        tried = grid(op, config(op, sm, head=128), sm)
        assert len({tuple(choice.items()) for choice in tried}) == len(tried)
        return {(c["TMA"], c["WARP_SPECIALIZE"], c["num_warps"]) for c in tried}

    plain, tma = {(0, 0, 4), (0, 0, 8)}, {(1, 0, 4), (1, 0, 8)}
    assert offered(80) == offered(89) == plain
    assert offered(90) == plain | tma | {(1, 1, 4)}
    assert offered(100) == offered(120) == plain | tma | {(1, 1, 4), (1, 1, 8)}


@pytest.mark.parametrize("programs", [True, False])
def test_the_table_holds_what_programs_run(programs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "PROGRAMS_HAVE_TMA", programs)
    found = [replace(candidate(name), choice={"TMA": len(name) - 1}) for name in ("a", "bb")]
    asked = Workload(op="attention", shape={"head": 7}, tolerance=0.1, prepare=lambda: found)
    report, entry = tune.tune(asked, 90, MACHINE, lambda _: [[2e-6], [1e-6]])
    assert entry is not None
    assert entry.choice == {"TMA": int(programs)}
    assert ("bb takes 1.0 us; programs need PyTorch 2.12" in report) is not programs


def test_every_op_is_measured_at_the_sizes_of_both_models() -> None:
    for op in OPS:
        found = list(workloads(op, CPU))
        shapes = {tuple(workload.shape.items()) for workload in found}
        assert len(shapes) == len(found)
        sizes = set(itertools.chain.from_iterable(workload.shape.values() for workload in found))
        if op in PRODUCTS or op in GEMMS:
            assert {1536, 5120} <= sizes
        else:
            assert set(LENGTHS) <= sizes
        if op in GRIDS:
            assert {12, 40} <= sizes or {1536, 5120} <= sizes or {8960, 13824} <= sizes


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads_module, "MODELS", ((64, 2, 48),))
    monkeypatch.setattr(workloads_module, "LENGTHS", (20,))
    monkeypatch.setattr(workloads_module, "TEXT", 6)


@pytest.mark.usefixtures("_tiny")
@pytest.mark.parametrize("op", ["rms_norm_rope", "gelu_quantize", "attention_8bit"])
def test_real_kernels_from_candidates_to_the_table(op: str, tmp_path: Path) -> None:
    """All candidates compute the same; what the timer calls fastest is used from then on."""

    def last_is_fastest(calls: Sequence[Callable[[], object]]) -> list[list[float]]:
        return [[1e-6 * (len(calls) - i)] for i in range(len(calls))]

    output = tmp_path / "tuned.json"
    table = load_table(launch_config.TABLE)
    tune_ops(table, [op], output, 90, MACHINE, torch.device(DEVICE), lambda _: last_is_fastest)
    found = [entry for entry in load_table(output) if entry not in table]
    assert len(found) == (2 if op == "attention_8bit" else 1)
    for entry in found:
        fastest = grid(op, {}, 90)[-1]
        assert (entry.op, entry.sm, entry.choice) == (op, 90, fastest)
        assert entry.measured is not None
        times = entry.measured.pop("us")
        assert entry.measured == MACHINE
        assert min(times.values()) == 1
        assert len(times) == 2
        assert config(op, 90, **entry.shape) == fastest
    assert len(load_table(output)) == len(table) + len(found)


def providers_workload(candidates: list[Candidate]) -> Workload:
    return Workload(
        op="attention_providers_8bit", shape={"keys": 7}, tolerance=0.1, prepare=lambda: candidates
    )


def test_providers_are_ranked_by_time() -> None:
    candidates = [candidate("cudnn"), candidate("wrong", -RIGHT), candidate("triton-8bit")]
    report, entry = tune.tune(
        providers_workload(candidates), 90, MACHINE, lambda _: [[2e-6], [1e-6]]
    )
    assert entry is not None
    assert entry.choice == ["triton-8bit", "cudnn"]
    assert entry.measured == {**MACHINE, "us": {"triton-8bit": 1.0, "cudnn": 2.0}}
    assert report.splitlines() == [
        "attention_providers_8bit, keys=7: triton-8bit in 1.0 us; cudnn takes 2.0 us",
        "  dropped wrong: its result differs by 2",
    ]


def test_where_nothing_runs_the_table_stays() -> None:
    report, entry = tune.tune(providers_workload([]), 90, MACHINE, no_timer)
    assert (report, entry) == ("attention_providers_8bit, keys=7: nothing runs", None)
    broken = [candidate("cudnn", RuntimeError("no plan"))]
    report, entry = tune.tune(providers_workload(broken), 90, MACHINE, no_timer)
    assert entry is None
    assert report.endswith(": left as it is\n  dropped cudnn: no plan")


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_providers_of_16_bits_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are what others are compared with; those that cannot run are no candidates."""
    absent = ("fa3", "cudnn-fp8")
    fake = {
        name: replace(provider, unsupported_reason=lambda *_, n=name: "no" if n in absent else None)
        for name, provider in backends.BACKENDS.items()
    }
    monkeypatch.setattr(backends, "BACKENDS", fake)
    monkeypatch.setattr(workloads_module, "BACKENDS", fake)
    (first, *_) = workloads("attention_providers_8bit", torch.device("meta"))
    assert [found.name for found in first.prepare()] == ["cudnn", "flash", "triton", "triton-8bit"]


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_there_is_nothing_to_measure(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentMismatchError, match="needs an NVIDIA GPU"):
        run(OPS, tmp_path / "tuned.json", 7)
    with pytest.raises(UsageError, match="no op gemm to tune; known are adaln"):
        run(["gemm"], tmp_path / "tuned.json", 7)
    assert not list(tmp_path.iterdir())


def test_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tune", "--op", "gemm"])
    with pytest.raises(SystemExit) as ending:
        main()
    assert ending.value.code == 2
    out, said = capsys.readouterr()
    assert (out, said.count("\n")) == ("", 1)
    assert said.startswith("error: there is no op gemm to tune")


def test_the_ends_of_every_grid_compile() -> None:
    """For Hopper; compiling all of them takes minutes."""
    code = """
import torch
from wanx.kernels.aot_compile import compile_for, record
from benchmarks.tuning.workloads import GRIDS, workloads
for op in GRIDS:
    candidates = list(workloads(op, torch.device("meta")))[-1].prepare()
    for candidate in (candidates[1], candidates[-1]):
        compile_for(record(90, candidate.call)[-1], 90)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=300)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
def test_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads_module, "MODELS", ((1536, 12, 8960),))
    monkeypatch.setattr(workloads_module, "LENGTHS", (2000,))
    output = tmp_path / "tuned.json"
    run(["quantize", "attention_providers_16bit"], output, 3)
    found = [entry for entry in load_table(output) if entry.measured]
    assert {entry.op for entry in found} == {"quantize", "attention_providers_16bit"}
    assert all(min(entry.measured["us"].values()) > 0 for entry in found if entry.measured)


def test_what_there_is_no_time_for_is_dropped() -> None:
    """All but the first, without which nothing is known of any."""
    outcome = measure([candidate("first"), candidate("late")], 0.01, no_timer, deadline=0.0)
    assert outcome.microseconds.keys() == {"first"}
    assert outcome.dropped == {"late": "no time was left to try it"}
