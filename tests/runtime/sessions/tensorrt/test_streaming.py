"""Weights that do not fit the GPU's memory, on a simulated GPU whose streams run in any order."""

from __future__ import annotations

import json
import logging
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.fake_gpu import INVALID, OUT_OF_MEMORY, FakeCuda, FakeTensorRT, engine_file
from wanx.bundle.engine_schedule import SCHEDULE, EngineSchedule, Program, Step, Weight
from wanx.bundle.reader import Bundle
from wanx.commands.display.generation import log_lines
from wanx.errors import UsageError, WanxError
from wanx.files.safetensors import SafetensorsWriter
from wanx.runtime.sessions import open_session
from wanx.runtime.sessions.device import weights
from wanx.runtime.sessions.registry import require_budget
from wanx.runtime.sessions.tensorrt.session import TensorRTSession

BLOCKS = 7
UNIT = 1024 + 512  # bytes of a block's matrix and bias, each rounded up
WEIGHTS = 512 + BLOCKS * UNIT + 512
DICE = random.Random(0)
COPIES_LAST, COPIES_FIRST = min, max  # the stream that computes is the older one


def entry(tokens: np.ndarray, w: np.ndarray) -> list[np.ndarray]:
    return [tokens @ w, tokens * 2]


def block(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> list[np.ndarray]:
    return [np.tanh(x @ w + b)]


def end(x: np.ndarray, w: np.ndarray) -> list[np.ndarray]:
    return [x @ w]


def grow(x: np.ndarray) -> list[np.ndarray]:
    return [np.concatenate([x, x])]


def stored_weights() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"entry.w": (4, 16), "end.w": (16, 4)}
    for n in range(BLOCKS):
        shapes |= {f"blocks.{n}.w": (16, 16), f"blocks.{n}.b": (16,)}
    return {n: generator.standard_normal(s, dtype=np.float32) for n, s in shapes.items()}


def expected(tokens: np.ndarray) -> np.ndarray:
    weights = stored_weights()
    x, _ = entry(tokens, weights["entry.w"])
    for n in range(BLOCKS):
        (x,) = block(x, weights[f"blocks.{n}.w"], weights[f"blocks.{n}.b"])
    return end(x, weights["end.w"])[0]


def write_engines(folder: Path) -> None:
    def sizes(width: int) -> tuple[str, list[list[int]]]:
        return "F32", [[1, width], [200, width]]

    def weight(*shape: int) -> tuple[str, list[list[int]]]:
        return "F32", [list(shape), list(shape)]

    for name, inputs, outputs in (
        ("entry", {"tokens": sizes(4), "weight.w": weight(4, 16)}, ("x", "unread")),
        ("block", {"x": sizes(16), "weight.w": weight(16, 16), "weight.b": weight(16)}, ("x",)),
        ("end", {"x": sizes(16), "weight.w": weight(16, 4)}, ("y",)),
    ):
        engine_file(folder / f"{name}.engine", name, inputs, dict.fromkeys(outputs, "F32"))


@pytest.fixture
def bundle(tmp_path: Path) -> Any:
    """Blocks of equal size between an entry, one of whose outputs nothing reads, and an end.

    Some of the blocks are another program, as where a network adds hints.
    """
    folder = tmp_path / "engines"
    folder.mkdir()
    write_engines(folder)
    shapes = {"entry": {"w": (4, 16)}, "block": {"w": (16, 16), "b": (16,)}, "end": {"w": (16, 4)}}
    programs = {
        name: Program(
            file=f"{name}.engine",
            weights=tuple(Weight(sources=(n,), dtype="F32", shape=s) for n, s in of.items()),
        )
        for name, of in shapes.items()
    }
    programs["hinted"] = programs["block"]
    blocks = [
        Step(
            program="hinted" if n % 3 else "block",
            prefix=f"blocks.{n}.",
            inputs=("x",),
            outputs=("x",),
        )
        for n in range(BLOCKS)
    ]
    first = Step(program="entry", prefix="entry.", inputs=("tokens",), outputs=("x", "unread"))
    last = Step(program="end", prefix="end.", inputs=("x",), outputs=("y",))
    schedule = EngineSchedule(
        compiler="tensorrt 99.0", device="sm89", input_dtypes={"tokens": "F32"}, programs=programs,
        steps=(first, *blocks, last),
    )  # fmt: skip
    (folder / SCHEDULE).write_text(schedule.to_json())
    file, weights = tmp_path / "dit.safetensors", stored_weights()
    with SafetensorsWriter(file, [(n, "F32", a.shape) for n, a in weights.items()]) as writer:
        for array in weights.values():
            writer.write(array.tobytes())  # type: ignore[arg-type]
    record = SimpleNamespace(
        engines={"tensorrt": f"engines/{SCHEDULE}"}, weights=(file.name,), outputs=("y",)
    )
    manifest: Any = SimpleNamespace(target="tensorrt", components={"dit": record}, files={})
    return Bundle(tmp_path, manifest, "0")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    trt = FakeTensorRT(fake, {f.__name__: f for f in (entry, block, end, grow)})
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr("wanx.runtime.sessions.device.cuda.RESERVED_BYTES", 0)
    monkeypatch.setattr(
        "wanx.runtime.sessions.tensorrt.session.import_tensorrt", lambda _, **__: trt
    )
    monkeypatch.setattr(
        "wanx.runtime.sessions.tensorrt.loader.register", lambda _: SimpleNamespace(problem=None)
    )
    monkeypatch.setenv("WANX_TRUST_ENGINES", "1")
    return fake


def open_dit(bundle: Any, budget: int | None) -> TensorRTSession:
    session = open_session(bundle, "dit", vram_budget=budget)
    assert isinstance(session, TensorRTSession)
    return session


def tokens(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((length, 4), dtype=np.float32)


def check(session: TensorRTSession, length: int, seed: int = 0) -> None:
    given = tokens(length, seed)
    np.testing.assert_array_equal(session.run({"tokens": given})["y"], expected(given))


def needed(bundle: Any, cuda: FakeCuda, length: int) -> int:
    """Bytes beside the weights, from a run that has all it wants."""
    with open_dit(bundle, None) as session:
        check(session, length)
        assert cuda.device.used > WEIGHTS
        used = cuda.device.used - WEIGHTS
    cuda.device.peak = 0
    return used


def nothing_left(cuda: FakeCuda) -> None:
    assert cuda.device.live == {}
    assert cuda.host.live == {}
    assert cuda.open == set()


def in_any_order(ready: list[int]) -> int:
    return DICE.choice(ready)


@pytest.mark.parametrize("hurry", [COPIES_LAST, COPIES_FIRST, in_any_order])
@pytest.mark.parametrize("streamed", range(3, BLOCKS + 1))
def test_runs_are_as_without_streaming(
    bundle: Any, cuda: FakeCuda, streamed: int, hurry: Callable[[list[int]], int]
) -> None:
    """However late or early copies are made; within the budget, and never recorded."""
    beside = needed(bundle, cuda, 20)
    cuda.calls.clear()
    budget = WEIGHTS + beside - (streamed - 2) * UNIT
    cuda.hurry = hurry
    with open_dit(bundle, budget) as session:
        for seed in range(5):
            check(session, 20, seed)
        assert session._runner._weights.streamed == streamed
        assert cuda.device.peak == budget
        assert "cudaStreamBeginCapture" not in cuda.calls
        for length in (3, 20, 19):  # other shapes, at once or in the place of each other
            for seed in range(3):
                check(session, length, seed)
        assert cuda.device.peak <= budget
    nothing_left(cuda)


def test_what_is_streamed_is_evenly_spread(bundle: Any, cuda: FakeCuda) -> None:
    for room in range(WEIGHTS - (BLOCKS - 2) * UNIT, WEIGHTS, UNIT):
        with open_dit(bundle, room) as session:
            weights = session._runner._weights
            steps = sorted(weights._pinned)
            assert len(steps) == weights.streamed == 2 + (WEIGHTS - room) // UNIT
            gaps = np.diff([*steps, steps[0] + BLOCKS])  # round to the next run
            assert gaps.max() - gaps.min() <= 1


def test_a_larger_size_takes_the_place_of_weights(
    bundle: Any, cuda: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    small, large = needed(bundle, cuda, 3), needed(bundle, cuda, 150)
    budget = WEIGHTS + max(small, large - 2 * UNIT)
    with open_dit(bundle, budget) as session, caplog.at_level(logging.INFO, "wanx.runtime"):
        for seed in range(4):
            check(session, 3, seed)
        assert session._runner._weights.streamed == 0
        assert "cudaGraphLaunch" in cuda.calls
        for seed in range(4):
            check(session, 150, seed)
        assert session._runner._weights.streamed >= 3
        check(session, 3)
    assert cuda.device.peak <= budget
    nothing_left(cuda)
    assert caplog.messages[0] == "dit: 0.00 of 0.00 GiB of GPU memory"
    assert "of 7 blocks streamed" in caplog.messages[1]


def test_an_output_that_nothing_reads(bundle: Any, cuda: FakeCuda) -> None:
    """Its memory goes on to the next that needs as much; the prediction knows."""
    with open_dit(bundle, None) as session:
        for seed in range(4):
            check(session, 40, seed)
        (buffers,) = session._runner._buffers.values()
        assert cuda.device.used == WEIGHTS + buffers.shapes.total_bytes
    nothing_left(cuda)


def test_what_is_free_is_the_budget(bundle: Any, cuda: FakeCuda) -> None:
    beside = needed(bundle, cuda, 20)
    cuda.device.limit = WEIGHTS + beside - UNIT
    with open_dit(bundle, None) as session:
        check(session, 20)
        assert session._runner._weights.streamed == 3
    nothing_left(cuda)


def test_a_budget_that_is_too_small(bundle: Any, cuda: FakeCuda) -> None:
    least = WEIGHTS - (BLOCKS - 2) * UNIT
    with pytest.raises(WanxError, match=r"for dit .its weights take at least .* by --vram-budget"):
        open_dit(bundle, least - 1)
    nothing_left(cuda)
    with open_dit(bundle, least + 4096) as session:
        with pytest.raises(WanxError, match=r"dit .this size takes at least .*a smaller size"):
            check(session, 200)
        check(session, 1)
    assert cuda.device.peak <= least + 4096
    nothing_left(cuda)


@pytest.mark.parametrize("fails", range(1, 25))
def test_a_copy_fails(bundle: Any, cuda: FakeCuda, fails: int) -> None:
    """Wherever that is, the next run starts the copies over and nothing is lost."""
    beside = needed(bundle, cuda, 20)
    cuda.hurry = in_any_order
    with open_dit(bundle, WEIGHTS + beside - 3 * UNIT) as session:
        check(session, 20)
        copy, calls = cuda.cudaMemcpyAsync, iter(range(1, 1000))

        def copies(*given: Any) -> tuple[int]:
            return (INVALID,) if next(calls) == fails else copy(*given)

        cuda.cudaMemcpyAsync = copies  # type: ignore[method-assign]
        failed = 0
        for seed in range(6):
            try:
                check(session, 20, seed)
            except WanxError:
                failed += 1
        assert failed == 1
    nothing_left(cuda)


@pytest.mark.parametrize("known", [True, False])
def test_the_host_has_too_little_memory(
    bundle: Any, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """What the system does not say, CUDA does; either way a later run works."""
    beside = needed(bundle, cuda, 20)
    pin, room = cuda.cudaMallocHost, UNIT

    def pins(size: int) -> tuple[int, int | None]:
        return pin(size) if size != room else (OUT_OF_MEMORY, None)

    left: list[int | None] = [3 * UNIT - 1 if known else None]
    monkeypatch.setattr(weights, "available_memory", lambda: left[0])
    with open_dit(bundle, WEIGHTS + beside - 1) as session:
        cuda.cudaMallocHost = pins  # type: ignore[method-assign]
        with pytest.raises(WanxError, match="are available; end" if known else "out of memory"):
            check(session, 20)
        cuda.cudaMallocHost = pin  # type: ignore[method-assign]
        left[0] = 3 * UNIT
        check(session, 20)
    nothing_left(cuda)


@pytest.mark.parametrize("call", ["cudaEventCreate", "cudaMallocHost", "cudaMalloc"])
def test_loading_fails(bundle: Any, cuda: FakeCuda, call: str) -> None:
    cuda.refuses = {call}
    with pytest.raises(WanxError, match=f"{call}: invalid argument"):
        open_dit(bundle, WEIGHTS - UNIT)
    nothing_left(cuda)


def test_scratch_that_is_as_large_for_every_shape(bundle: Any, cuda: FakeCuda) -> None:
    """TensorRT wants it again when the shapes change, though size and address stay the same."""
    folder = bundle.root / "engines"
    x = ("F32", [[1, 4], [200, 4]])
    engine_file(folder / "grow.engine", "grow", {"x": x}, {"y": "F32"})
    file = folder / "grow.engine"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scratch": 4096}))
    steps = [Step(program="grow", inputs=(name,), outputs=("y",)) for name in ("x", "y", "y")]
    schedule = EngineSchedule(
        compiler="tensorrt 99.0", device="sm89", input_dtypes={"x": "F32"}, steps=tuple(steps),
        programs={"grow": Program(file=file.name, weights=())},
    )  # fmt: skip
    (folder / SCHEDULE).write_text(schedule.to_json())
    with open_dit(bundle, None) as session:
        for seed in range(4):  # recorded and replayed, too
            given = tokens(3, seed)
            found = session.run({"x": given})["y"]
            np.testing.assert_array_equal(found, np.tile(given, (8, 1)))
    nothing_left(cuda)


def test_targets_without_streaming() -> None:
    for target in ("rtx", "tensorrt"):
        require_budget(target)
    with pytest.raises(UsageError, match="runs on the processor"):
        require_budget("cpu")
    with pytest.raises(UsageError, match="PyTorch manages the memory"):
        require_budget("aoti")


def test_memory_is_said_once_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("wanx.runtime")
    for quiet, wanted in ((True, ""), (False, "dit: 1\n")):
        with log_lines(quiet, "wanx.runtime"):
            for _ in range(2):
                log.info("dit: %d", 1)
        log.info("after")
        captured = capsys.readouterr()
        assert (captured.out, captured.err) == ("", wanted)
