"""Sessions on TensorRT against a GPU and a TensorRT that are not real, and what needs neither."""

from __future__ import annotations

import logging
import re
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.fake_gpu import Diagnostics, FakeCuda, FakeTensorRT, engine_file
from wanx.bundle.engine_schedule import (
    SCHEDULE,
    EngineSchedule,
    Program,
    Step,
    Weight,
    read_schedule,
)
from wanx.bundle.reader import Bundle
from wanx.errors import CorruptInputError, EnvironmentMismatchError, UsageError, WanxError
from wanx.files.safetensors import SafetensorsWriter
from wanx.runtime.sessions import open_session
from wanx.runtime.sessions.base import State
from wanx.runtime.sessions.device import weight_files
from wanx.runtime.sessions.device.stored_types import as_float32, as_input
from wanx.runtime.sessions.tensorrt.library import import_tensorrt
from wanx.runtime.sessions.tensorrt.loader import Loader
from wanx.runtime.sessions.tensorrt.session import TensorRTSession

COMPILER = "tensorrt 99.0"
Arrays = dict[str, np.ndarray]


def embed(tokens: np.ndarray, timestep: np.ndarray, w: np.ndarray) -> list[np.ndarray]:
    return [tokens @ w, timestep[:, None] * w.sum()]


def block(
    x: np.ndarray, time: np.ndarray, cos: np.ndarray, w: np.ndarray, b: np.ndarray
) -> list[np.ndarray]:
    return [np.tanh(x @ w + b) + time[:, None] * 0.01 + cos[None]]


def head(x: np.ndarray, w: np.ndarray) -> list[np.ndarray]:
    return [x @ w]


def first(latent: np.ndarray) -> list[np.ndarray]:
    return [latent * 2, latent + 1]


def rest(latent: np.ndarray, cache: np.ndarray) -> list[np.ndarray]:
    return [latent + cache, latent + 2 * cache]


FUNCTIONS = {f.__name__: f for f in (embed, block, head, first, rest)}
TYPES = {"tokens": "F32", "timestep": "F32", "rope_cos": "F32"}
BF16 = "BF16"


def dit_schedule(**changes: Any) -> EngineSchedule:
    """Two equal blocks with a weight of two sources, between an entry and an end."""
    programs = {
        "embed": Program(
            file="embed.engine", weights=(Weight(sources=("w",), dtype="F32", shape=(4, 8)),)
        ),
        "block": Program(
            file="block.engine",
            weights=(
                Weight(sources=("top", "bottom"), dtype=BF16, shape=(8, 8)),
                Weight(sources=("b",), dtype="F32", shape=(8,)),
            ),
        ),
        "head": Program(
            file="head.engine", weights=(Weight(sources=("w",), dtype="F16", shape=(8, 4)),)
        ),
    }
    read = ("x", "time", "rope_cos")
    steps = (
        Step(
            program="embed", prefix="embed.", inputs=("tokens", "timestep"), outputs=("x", "time")
        ),
        Step(program="block", prefix="blocks.0.", inputs=read, outputs=("x",)),
        Step(program="block", prefix="blocks.1.", inputs=read, outputs=("x",)),
        Step(program="head", prefix="head.", inputs=("x",), outputs=("velocity",)),
    )
    schedule = EngineSchedule(
        compiler=COMPILER, device="sm80+sm89", input_dtypes=TYPES, batched=("tokens", "timestep"),
        programs=programs, steps=steps,
    )  # fmt: skip
    return schedule.model_copy(update=changes)


def dit_engines(folder: Path) -> None:
    batch = [[1, 1], [2, 100]]
    tokens = ("F32", [[*batch[0], 4], [*batch[1], 4]])
    x = ("F32", [[*batch[0], 8], [*batch[1], 8]])
    time = ("F32", [[1, 1], [2, 1]])
    engine_file(
        folder / "embed.engine",
        "embed",
        {
            "tokens": tokens,
            "timestep": ("F32", [[1], [2]]),
            "weight.w": ("F32", [[4, 8], [4, 8]]),
        },
        {"x": "F32", "time": "F32"},
    )
    engine_file(
        folder / "block.engine",
        "block",
        {
            "x": x,
            "time": time,
            "rope_cos": ("F32", [[1, 8], [100, 8]]),
            "weight.packed": (BF16, [[8, 8], [8, 8]]),
            "weight.b": ("F32", [[8], [8]]),
        },
        {"x": "F32"},
    )
    engine_file(
        folder / "head.engine",
        "head",
        {"x": x, "weight.w": ("F16", [[8, 4], [8, 4]])},
        {"velocity": "F32"},
    )


def dit_weights() -> dict[str, tuple[str, np.ndarray]]:
    """As they are stored: of other types than the engines take."""
    generator = np.random.default_rng(0)

    def numbers(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape, dtype=np.float32)

    found = {"embed.w": ("F32", numbers(4, 8)), "head.w": ("F32", numbers(8, 4))}
    for index in range(2):
        found[f"blocks.{index}.top"] = ("F32", numbers(3, 8))
        found[f"blocks.{index}.bottom"] = ("BF16", as_float32(as_input(numbers(5, 8), BF16), BF16))
        found[f"blocks.{index}.b"] = ("F16", numbers(8).astype(np.float16).astype(np.float32))
    return found


def write_weights(path: Path, weights: dict[str, tuple[str, np.ndarray]]) -> None:
    order = sorted(weights.items(), key=lambda item: item[1][0] != "F32")
    with SafetensorsWriter(path, [(n, t, a.shape) for n, (t, a) in order]) as writer:
        for _, (dtype, array) in order:
            writer.write(as_input(array, dtype).tobytes())  # type: ignore[arg-type]


def make_bundle(
    folder: Path, schedule: EngineSchedule, outputs: tuple[str, ...], name: str = "dit"
) -> Any:
    place = folder / "engines" / name
    place.mkdir(parents=True)
    (folder / "weights").mkdir(exist_ok=True)
    (place / SCHEDULE).write_text(schedule.to_json())
    record = SimpleNamespace(
        engines={"tensorrt": f"engines/{name}/{SCHEDULE}"},
        weights=(f"weights/{name}.safetensors",),
        outputs=outputs,
    )
    manifest: Any = SimpleNamespace(target="tensorrt", components={name: record}, files={})
    return Bundle(folder, manifest, "0")


@pytest.fixture
def bundle(tmp_path: Path) -> Any:
    found = make_bundle(tmp_path, dit_schedule(), ("velocity",))
    dit_engines(tmp_path / "engines" / "dit")
    write_weights(tmp_path / "weights" / "dit.safetensors", dit_weights())
    return found


def rewrite(bundle: Any, schedule: EngineSchedule) -> None:
    (bundle.root / "engines" / "dit" / SCHEDULE).write_text(schedule.to_json())


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(weight_files, "STAGE", 64)
    monkeypatch.setattr("wanx.runtime.sessions.device.cuda.RESERVED_BYTES", 0)
    monkeypatch.setenv("WANX_TRUST_ENGINES", "1")
    return fake


def install(monkeypatch: pytest.MonkeyPatch, trt: FakeTensorRT) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(
        "wanx.runtime.sessions.tensorrt.session.import_tensorrt", lambda _, **__: trt
    )

    def register(module: Any) -> Any:
        assert module is trt
        trt.order.append("register")
        return SimpleNamespace(problem=None)

    monkeypatch.setattr("wanx.runtime.sessions.tensorrt.loader.register", register)


@pytest.fixture
def trt(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    fake = FakeTensorRT(cuda, FUNCTIONS)
    install(monkeypatch, fake)
    return fake


def open_dit(bundle: Any) -> TensorRTSession:
    session = open_session(bundle, "dit")
    assert isinstance(session, TensorRTSession)
    return session


def feeds(length: int, seed: int, batch: int = 1) -> Arrays:
    generator = np.random.default_rng(seed)
    tokens = generator.standard_normal((batch, length, 4), dtype=np.float32)
    return {"tokens": tokens, "timestep": generator.uniform(1, 9, batch).astype(np.float32)}


def rope(length: int, seed: int = 9) -> Arrays:
    return {"rope_cos": np.random.default_rng(seed).random((length, 8), dtype=np.float32)}


def expected(given: Arrays) -> np.ndarray:
    """The whole schedule in numpy, with the weights as the engines take them."""
    weights = {n: a for n, (_, a) in dit_weights().items()}
    x, time = embed(given["tokens"], given["timestep"], weights["embed.w"])
    for index in range(2):
        names = [f"blocks.{index}.{part}" for part in ("top", "bottom")]
        packed = np.concatenate([weights[name] for name in names])
        packed = as_float32(as_input(packed, BF16), BF16)
        (x,) = block(x, time, given["rope_cos"], packed, weights[f"blocks.{index}.b"])
    (out,) = head(x, weights["head.w"].astype(np.float16).astype(np.float32))
    return out


def nothing_left(cuda: FakeCuda) -> None:
    assert cuda.device.live == {}
    assert cuda.host.live == {}
    assert cuda.open == set()


def test_runs_of_several_shapes(bundle: Any, cuda: FakeCuda, trt: FakeTensorRT) -> None:
    """Five runs of each: the first two launch, the third is recorded, the others replay."""
    with open_dit(bundle) as session:
        assert trt.order == ["register", *3 * ["deserialise"]]
        for length in (3, 50):
            session.bind(rope(length))
            for seed in range(5):
                given = feeds(length, seed)
                found = session.run(given)
                assert found.keys() == {"velocity"}
                assert found["velocity"].dtype == np.float32
                np.testing.assert_array_equal(found["velocity"], expected(given | rope(length)))
        runs = {c.engine.made["function"]: c.runs for c in trt.contexts}
        assert runs == {"embed": 6, "block": 12, "head": 6}
        assert cuda.calls.count("cudaGraphLaunch") == 6
    nothing_left(cuda)
    session.close()


def test_a_result_is_not_overwritten_by_the_next(
    bundle: Any, cuda: FakeCuda, trt: FakeTensorRT
) -> None:
    with open_dit(bundle) as session:
        session.bind(rope(7))
        made = [session.run(feeds(7, seed))["velocity"] for seed in range(5)]
    for seed, found in enumerate(made):
        np.testing.assert_array_equal(found, expected(feeds(7, seed) | rope(7)))


def test_new_constants_keep_the_graph(bundle: Any, cuda: FakeCuda, trt: FakeTensorRT) -> None:
    with open_dit(bundle) as session:
        for seed in range(4):
            session.bind(rope(7, seed))
            found = session.run(feeds(7, seed))["velocity"]
            np.testing.assert_array_equal(found, expected(feeds(7, seed) | rope(7, seed)))
        assert cuda.calls.count("cudaGraphInstantiate") == 1
        assert cuda.calls.count("cudaGraphLaunch") == 2


def test_memory_is_taken_once_per_shape(bundle: Any, cuda: FakeCuda, trt: FakeTensorRT) -> None:
    with open_dit(bundle) as session:
        session.bind(rope(40))
        session.run(feeds(40, 0))
        taken = cuda.device.allocations, cuda.host.allocations
        for seed in range(1, 5):
            cuda.calls.clear()
            session.run(feeds(40, seed))
            # Two inputs and one output: constants are where they were.
            assert cuda.calls.count("cudaMemcpyAsync") == 3
        assert (cuda.device.allocations, cuda.host.allocations) == taken
        # Two buffers for the stream, since a block reads one and writes the other.
        sizes = [len(data) for data in cuda.device.live.values()]
        assert sizes.count(-(-40 * 8 * 4 // 512) * 512) == 2 + 1  # and the constant


def test_only_some_shapes_are_kept(bundle: Any, cuda: FakeCuda, trt: FakeTensorRT) -> None:
    with open_dit(bundle) as session:
        for length in (*range(1, 8), 1):
            for seed in range(3):
                given = feeds(length, seed) | rope(length)
                np.testing.assert_array_equal(session.run(given)["velocity"], expected(given))
        assert len([name for name in cuda.open if "executable" in name]) == 4
    nothing_left(cuda)


def test_two_at_once_are_each_alone(bundle: Any, cuda: FakeCuda, trt: FakeTensorRT) -> None:
    given = [feeds(6, seed) for seed in (1, 2)]
    alone = [expected(feed | rope(6)) for feed in given]
    for limit, launches in ((0, 2), (6, 1), (5, 2)):
        rewrite(bundle, dit_schedule(max_batched_tokens=limit))
        trt.contexts.clear()
        with open_dit(bundle) as session:
            session.bind(rope(6))
            for found, wanted in zip(session.run_each(given), alone, strict=True):
                np.testing.assert_allclose(found["velocity"], wanted, rtol=1e-6)
            assert trt.contexts[0].runs == launches


def test_one_entry_serves_the_batch(bundle: Any, cuda: FakeCuda, trt: FakeTensorRT) -> None:
    given = feeds(6, 1, batch=2) | rope(6)
    given["timestep"] = given["timestep"][:1]
    with open_dit(bundle) as session:
        found = session.run(given)["velocity"]
    repeated = given | {"timestep": np.repeat(given["timestep"], 2)}
    np.testing.assert_array_equal(found, expected(repeated))


def test_without_graphs(
    bundle: Any, cuda: FakeCuda, trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANX_CUDA_GRAPHS", "0")
    with open_dit(bundle) as session:
        for seed in range(4):
            session.run(feeds(3, seed) | rope(3))
    assert "cudaStreamBeginCapture" not in cuda.calls


@pytest.mark.parametrize("cause", ["TensorRT", "capture", "instantiate"])
def test_capture_fails(
    bundle: Any, cuda: FakeCuda, trt: FakeTensorRT, caplog: pytest.LogCaptureFixture, cause: str
) -> None:
    """It is tried once, and said once; the programs go on one by one."""
    trt.capturable = cause != "TensorRT"
    refused = {"capture": "cudaStreamBeginCapture", "instantiate": "cudaGraphInstantiate"}
    cuda.refuses = {refused[cause]} if cause in refused else set()
    with open_dit(bundle) as session, caplog.at_level(logging.WARNING):
        for seed in range(5):
            given = feeds(3, seed) | rope(3)
            np.testing.assert_array_equal(session.run(given)["velocity"], expected(given))
    assert len(caplog.records) == 1
    assert "one by one" in caplog.text
    nothing_left(cuda)


def test_a_launch_fails_during_capture(
    bundle: Any, cuda: FakeCuda, trt: FakeTensorRT, caplog: pytest.LogCaptureFixture
) -> None:
    with open_dit(bundle) as session:
        for seed in range(2):
            session.run(feeds(3, seed) | rope(3))
        execute = type(trt.contexts[2]).execute_async_v3

        def refuse_once(context: Any, stream: int) -> bool:
            trt.contexts[2].execute_async_v3 = lambda s: execute(context, s)  # type: ignore[method-assign]
            return False

        trt.contexts[2].execute_async_v3 = lambda s: refuse_once(trt.contexts[2], s)  # type: ignore[method-assign]
        given = feeds(3, 2) | rope(3)
        np.testing.assert_array_equal(session.run(given)["velocity"], expected(given))
    assert "head, running it" in caplog.text
    nothing_left(cuda)


def vae_bundle(folder: Path, name: str) -> Any:
    """One of the two networks of a decoder; it has no weights."""
    latent = ("F32", [[1, 4], [9, 4]])
    if name == "first":
        inputs: dict[str, Any] = {"latent": latent}
    else:
        inputs = {"latent": latent, "cache": ("BF16", latent[1])}
    schedule = EngineSchedule(
        compiler=COMPILER, device="sm89", input_dtypes={n: t for n, (t, _) in inputs.items()},
        programs={name: Program(file=f"{name}.engine", weights=())},
        steps=(
            Step(program=name, inputs=tuple(inputs), outputs=("video", "cache_next")),
        ),
    )  # fmt: skip
    found = make_bundle(folder, schedule, ("video", "cache_next"), name)
    engine_file(
        folder / "engines" / name / f"{name}.engine",
        name,
        inputs,
        {"video": "F32", "cache_next": "BF16"},
    )
    write_weights(folder / "weights" / f"{name}.safetensors", {"unused": ("F32", np.ones(1))})
    return found


def test_state_goes_from_run_to_run(tmp_path: Path, cuda: FakeCuda, trt: FakeTensorRT) -> None:
    """It outlives the session that made it, and is never copied to the host."""
    state: State = {}
    latents = [np.full((2, 4), 2**n, np.float32) for n in range(5)]
    with open_session(vae_bundle(tmp_path, "first"), "first") as session:
        video = session.run({"latent": latents[0]}, state)
        assert video.keys() == {"video"}
        assert state.keys() == {"cache"}
    assert len(cuda.device.live) == 1
    cache = latents[0] + 1
    with open_session(vae_bundle(tmp_path, "rest"), "rest") as session:
        taken = []
        for latent in latents[1:]:
            found = session.run({"latent": latent}, state)
            np.testing.assert_array_equal(found["video"], latent + cache)
            cache = latent + 2 * cache
            taken.append(cuda.device.allocations)
        # From the second run on there are two caches: one is read and the other written. The
        # first of them was there before, so that it is in no prediction.
        assert taken[1:] == [taken[1]] * 3
        (buffers,) = session._runner._buffers.values()  # type: ignore[attr-defined]
        assert cuda.device.used == 512 + buffers.shapes.total_bytes
        assert "cudaStreamBeginCapture" not in cuda.calls
        stateless = session.run({"latent": latents[0]}, dict(state))
        assert stateless.keys() == {"video"}
    assert len(cuda.device.live) == 1
    state.clear()
    nothing_left(cuda)


def test_state_that_nobody_keeps(tmp_path: Path, cuda: FakeCuda, trt: FakeTensorRT) -> None:
    with open_session(vae_bundle(tmp_path, "first"), "first") as session:
        for _ in range(4):
            found = session.run({"latent": np.ones((2, 4), np.float32)})
            np.testing.assert_array_equal(found["cache_next"], np.full((2, 4), 2))
    nothing_left(cuda)


def test_state_of_another_engine(tmp_path: Path, cuda: FakeCuda, trt: FakeTensorRT) -> None:
    given = {"latent": np.ones((2, 4), np.float32)}
    with (
        open_session(vae_bundle(tmp_path, "rest"), "rest") as session,
        pytest.raises(WanxError, match="state cache comes from another"),
    ):
        session.run(given, {"cache": np.ones((2, 4))})


def test_rtx_and_what_it_compiles(
    bundle: Any, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Kernels are kept in the cache folder; what is there and does not fit is replaced."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kernels = tmp_path / "cache" / "wanx" / "tensorrt" / "kernels"
    for start in (None, None, b"of another driver"):
        trt = FakeTensorRT(cuda, FUNCTIONS, rtx=True)
        install(monkeypatch, trt)
        known = sorted(kernels.iterdir()) if start is None and kernels.exists() else []
        if start is not None:
            for file in kernels.iterdir():
                file.write_bytes(start)
        with open_dit(bundle) as session:
            read = [context.config.cache.data for context in trt.contexts]
            assert read == [b"kernels compiled" if known else b""] * 3
            session.run(feeds(3, 0) | rope(3))
        files = sorted(kernels.iterdir())
        assert [file.read_bytes() for file in files] == 3 * [b"kernels compiled"]
        assert all(file.name.endswith("-99.0-sm89") for file in files)
        assert not known or files == known


def test_a_read_only_cache_folder(
    bundle: Any, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    install(monkeypatch, FakeTensorRT(cuda, FUNCTIONS, rtx=True))
    with open_dit(bundle) as session:
        session.run(feeds(3, 0) | rope(3))


def test_a_second_profile(bundle: Any, cuda: FakeCuda, trt: FakeTensorRT) -> None:
    folder = bundle.root / "engines" / "dit"
    for file in folder.glob("*.engine"):
        file.write_text(file.read_text().replace('"profiles": 1', '"profiles": 2'))
    with open_dit(bundle) as session:
        for length in (150, 3, 150):
            given = feeds(length, 0) | rope(length)
            np.testing.assert_array_equal(session.run(given)["velocity"], expected(given))
        assert {context.profile for context in trt.contexts} == {1}
        with pytest.raises(UsageError, match="not"):
            session.run(feeds(201, 0) | rope(201))


def test_a_size_that_is_not_covered(bundle: Any, cuda: FakeCuda, trt: FakeTensorRT) -> None:
    with open_dit(bundle) as session:
        with pytest.raises(UsageError) as caught:
            session.run(feeds(101, 0) | rope(101))
        assert str(caught.value) == (
            "the engine embed.engine takes tokens from [1, 1, 4] to [2, 100, 4], not [1, 101, 4]: "
            f"choose another size, or run `wanx build {bundle.root} --target tensorrt` with "
            "--sizes and --frames that cover it"
        )
        session.run(feeds(100, 0) | rope(100))


@pytest.mark.parametrize(
    ("update", "words"),
    [
        ({"compiler": "tensorrt 10.0"}, "built for tensorrt 10.0, found tensorrt 99.0: run"),
        ({"device": "sm90+sm120"}, "built for sm90[+]sm120, found sm89: run"),
        ({"device": "sm90+"}, "built for sm90[+], found sm89: run"),
    ],
)
@pytest.mark.fault("engine of another machine")
def test_engines_of_another_machine(
    bundle: Any, cuda: FakeCuda, trt: FakeTensorRT, update: dict[str, Any], words: str
) -> None:
    rewrite(bundle, dit_schedule(**update))
    with pytest.raises(EnvironmentMismatchError, match=words) as caught:
        open_dit(bundle)
    assert f"`wanx build {bundle.root} --target tensorrt`" in str(caught.value)
    assert trt.order == []
    nothing_left(cuda)


@pytest.mark.parametrize("device", ["sm80+", "sm89+", "sm89", "sm80+sm89"])
def test_engines_for_this_machine_among_others(
    bundle: Any, cuda: FakeCuda, trt: FakeTensorRT, device: str
) -> None:
    rewrite(bundle, dit_schedule(device=device))
    with open_dit(bundle) as session:
        assert session.run(feeds(7, 0) | rope(7))["velocity"].shape[1] == 7


def test_rtx_is_told_for_which_gpu(bundle: Any, cuda: FakeCuda, trt: FakeTensorRT) -> None:
    bundle.manifest.target = "rtx"
    bundle.manifest.components["dit"].engines["rtx"] = f"engines/dit/{SCHEDULE}"
    with pytest.raises(CorruptInputError, match=r"for rtx were built by tensorrt 99\.0"):
        open_dit(bundle)
    rewrite(bundle, dit_schedule(device="sm120"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            sys.modules["wanx.runtime.sessions.tensorrt.session"].__dict__["MODULES"],
            "rtx",
            "tensorrt",
        )
        with pytest.raises(EnvironmentMismatchError, match=r"wanx build \S+ --target rtx:sm89`"):
            open_dit(bundle)
        # TensorRT-RTX builds nothing for the GPUs of data centres.
        patch.setattr(cuda, "sm", 90)
        with pytest.raises(EnvironmentMismatchError, match=r"wanx build \S+ --target tensorrt`"):
            open_dit(bundle)


def test_without_tensorrt(bundle: Any, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanx.runtime.sessions.registry.find_spec", lambda _: None)
    with pytest.raises(EnvironmentMismatchError, match=r"pip install 'wanx\[tensorrt\]'"):
        open_dit(bundle)


def test_without_cuda_python(
    bundle: Any, cuda: FakeCuda, trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(EnvironmentMismatchError, match=r"cuda-python .* 'wanx\[tensorrt\]'"):
        open_dit(bundle)


@pytest.mark.parametrize(("state", "words"), [(35, "CUDA driver version"), (0, "there is none")])
def test_without_a_gpu(
    bundle: Any, cuda: FakeCuda, trt: FakeTensorRT, state: int, words: str
) -> None:
    cuda.state, cuda.count = state, 0
    with pytest.raises(EnvironmentMismatchError, match=f"no GPU that CUDA can use .{words}"):
        open_dit(bundle)


@pytest.mark.fault("engine from elsewhere")
def test_engines_from_elsewhere(
    bundle: Any, cuda: FakeCuda, trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANX_TRUST_ENGINES")
    with pytest.raises(EnvironmentMismatchError, match=r"compiled elsewhere.*--target tensorrt"):
        open_dit(bundle)
    assert trt.order == []
    nothing_left(cuda)


@pytest.mark.parametrize(
    ("bits", "kind", "words"),
    [
        (0, CorruptInputError, "does not load this engine: header.size == blobSize failed; run"),
        (Diagnostics.MALFORMED_ENGINE, CorruptInputError, "does not load"),
        (Diagnostics.OLD_CUDA_DRIVER, EnvironmentMismatchError, "on sm89: OLD_CUDA_DRIVER"),
        (Diagnostics.INSUFFICIENT_GPU_MEMORY, WanxError, "not enough memory .* for dit"),
    ],
)
def test_an_engine_that_is_cut_short(
    bundle: Any, cuda: FakeCuda, trt: FakeTensorRT, bits: int, kind: type[WanxError], words: str
) -> None:
    trt.bits = bits
    path = bundle.root / "engines" / "dit" / "head.engine"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(kind, match=words):
        open_dit(bundle)
    nothing_left(cuda)


def test_weights_of_another_engine(bundle: Any, cuda: FakeCuda, trt: FakeTensorRT) -> None:
    path = bundle.root / "engines" / "dit" / "head.engine"
    path.write_text(path.read_text().replace('"F16"', '"BF16"'))
    with pytest.raises(CorruptInputError, match=r"head.engine: its weights are not those of its"):
        open_dit(bundle)
    path.write_text(path.read_text().replace('"BF16"', '"I4"'))
    with pytest.raises(CorruptInputError, match=r"weight.w is INT4"):
        open_dit(bundle)


def without(name: str) -> dict[str, tuple[str, np.ndarray]]:
    return {n: found for n, found in dit_weights().items() if n != name}


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (without("blocks.1.top"), "the weights of dit lack 'blocks.1.top'"),
        (
            dit_weights() | {"head.w": ("F32", np.ones((8, 5), np.float32))},
            r"'head.w' is \[8, 5\] in the weights of dit, its engine wants \[8, 4\]",
        ),
        (
            dit_weights() | {"head.w": ("I64", np.ones((8, 4)))},
            r"'head.w' is \['I64'\] .* wants \['F16'\]; export it again",
        ),
    ],
)
def test_weights_that_do_not_fit(
    bundle: Any, cuda: FakeCuda, trt: FakeTensorRT, weights: Any, words: str
) -> None:
    path = bundle.root / "weights" / "dit.safetensors"
    path.unlink()
    write_weights(path, dict(sorted(weights.items(), key=lambda item: item[1][0] != "I64")))
    with pytest.raises(CorruptInputError, match=words):
        open_dit(bundle)
    assert cuda.device.allocations == 0
    nothing_left(cuda)


def test_weights_that_do_not_fit_the_gpu(bundle: Any, cuda: FakeCuda, trt: FakeTensorRT) -> None:
    cuda.device.limit = 1000
    with pytest.raises(WanxError, match=r"for dit .its weights take at least 0.00 GiB .* are free"):
        open_dit(bundle)
    assert trt.order == ["register"]
    nothing_left(cuda)


@pytest.mark.fault("out of GPU memory")
def test_a_size_that_does_not_fit_the_gpu(bundle: Any, cuda: FakeCuda, trt: FakeTensorRT) -> None:
    """It is said before anything runs; other shapes make room before that."""
    with open_dit(bundle) as session:
        weights = cuda.device.used
        session.run(feeds(60, 0) | rope(60))
        alone = cuda.device.used - weights
        cuda.device.limit = weights + alone + 2000
        session.run(feeds(59, 0) | rope(59))
        assert cuda.device.used <= cuda.device.limit
        runs = trt.contexts[0].runs
        with pytest.raises(WanxError, match=r"for dit .this size takes at least .*fewer frames"):
            session.run(feeds(100, 0, batch=2) | rope(100))
        assert trt.contexts[0].runs == runs
        given = feeds(60, 1) | rope(60)
        np.testing.assert_array_equal(session.run(given)["velocity"], expected(given))
    nothing_left(cuda)


def test_the_prediction_is_what_is_taken(
    bundle: Any, cuda: FakeCuda, trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[int] = []
    with open_dit(bundle) as session:
        engine = session._runner
        make_room = engine._make_room

        def remember(needed: int) -> None:
            said.append(needed)
            make_room(needed)

        monkeypatch.setattr(engine, "_make_room", remember)
        before = cuda.device.used
        session.run(feeds(60, 0) | rope(60))
        assert said == [cuda.device.used - before]


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        ("execute", "the engine of dit failed (embed, running it: launch failed); `wanx build"),
        ("memory", "not enough memory on the device for dit (embed, running it: OutOfMemory"),
    ],
)
def test_what_tensorrt_says(
    bundle: Any, cuda: FakeCuda, trt: FakeTensorRT, refused: str, words: str
) -> None:
    with open_dit(bundle) as session:
        trt.refuses = {refused}
        with pytest.raises(WanxError, match=re.escape(words)):
            session.run(feeds(3, 0) | rope(3))
        trt.refuses = set()
        given = feeds(3, 0) | rope(3)
        np.testing.assert_array_equal(session.run(given)["velocity"], expected(given))


def test_a_context_that_cannot_be_made(bundle: Any, cuda: FakeCuda, trt: FakeTensorRT) -> None:
    trt.refuses = {"context"}
    with pytest.raises(WanxError, match="not enough memory on the device for dit"):
        open_dit(bundle)
    nothing_left(cuda)


def test_what_cuda_says(bundle: Any, cuda: FakeCuda, trt: FakeTensorRT) -> None:
    with open_dit(bundle) as session:
        cuda.refuses = {"cudaMemcpyAsync"}
        with pytest.raises(WanxError, match=r"dit failed .cudaMemcpyAsync: invalid argument"):
            session.run(feeds(3, 0) | rope(3))
        cuda.refuses = set()


def test_a_missing_input(bundle: Any, cuda: FakeCuda, trt: FakeTensorRT) -> None:
    with open_dit(bundle) as session, pytest.raises(WanxError, match="lacks the input rope_cos"):
        session.run(feeds(3, 0))


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")
def test_what_rtx_says_of_a_broken_engine(tmp_path: Path) -> None:
    """The real TensorRT-RTX, which reads the head of an engine without a GPU."""
    trt = import_tensorrt("tensorrt_rtx")
    loader = Loader(trt, "sm89", "wanx build b --target rtx:sm89")
    path = tmp_path / "a.engine"
    for data, words in (
        (b"x" * 1000, "kEXPECTED_MAGIC_TAG|magicTag"),
        (tiny_engine(trt, loader.log)[:-100], "plan.header.size == blobSize"),
    ):
        path.write_bytes(data)
        with pytest.raises(CorruptInputError, match=words):
            loader.load(path)


def tiny_engine(trt: Any, log: Any) -> bytes:
    builder = trt.Builder(log)
    network = builder.create_network(0)
    x = network.add_input("x", trt.float32, (2, 8))
    output = network.add_activation(x, trt.ActivationType.TANH).get_output(0)
    output.name = "out.x"
    network.mark_output(output)
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    return bytes(builder.build_serialized_network(network, config))


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")
def test_engines_list_tensors_in_the_order_of_the_graph() -> None:
    """Weights that are alike are told apart by their order alone; unused inputs stay, too."""
    trt = import_tensorrt("tensorrt_rtx")

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.text = ""

        def log(self, severity: Any, message: str) -> None:
            self.text += message

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    names = ["z", "unused", "a", "weight.2", "weight.1", "weight.10"]
    given = [network.add_input(name, trt.float32, (4, 4)) for name in names]
    x, y = given[0], given[2]
    for weight in (given[5], given[3], given[4]):
        x = network.add_elementwise(x, weight, trt.ElementWiseOperation.PROD).get_output(0)
        y = network.add_elementwise(y, x, trt.ElementWiseOperation.SUM).get_output(0)
    for name, value in (("out.y", y), ("out.a", x)):
        value.name = name
        network.mark_output(value)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    assert builder.build_serialized_network(network, config) is not None
    listed = log.text.partition("I/O Tensors:")[2]
    assert re.findall(r"Name: (\S+), IOMode", listed) == [*names, "out.y", "out.a"]


def test_plans_of_engines_are_read(bundle: Any) -> None:
    schedule = read_schedule(bundle.root / "engines" / "dit" / SCHEDULE)
    assert schedule == dit_schedule()


def test_layers_are_timed(bundle: Any, cuda: FakeCuda, trt: FakeTensorRT) -> None:
    with open_dit(bundle) as session:
        given = feeds(5, 0) | rope(5)
        for _ in range(4):  # the last is replayed
            expected = session.run(given)["velocity"]
        answers = []
        found = session.kernel_times(lambda: answers.append(session.run(given)["velocity"]))
        np.testing.assert_array_equal(answers[0], expected)
        # Of a program that several steps run, the calls of all of them; the fake says 2 ms each.
        calls = Counter(step.program for step in session.schedule.steps)
        assert {(t.program, t.name): t.calls for t in found} == {
            (program, layer): count
            for program, count in calls.items()
            for layer in ("product", "rest")
        }
        for time in found:
            assert time.seconds == pytest.approx(0.002 * time.calls)
        assert not session.kernel_times(lambda: None)
    nothing_left(cuda)
