"""Engines of TensorRT on a GPU against ONNX Runtime on the processor."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

import wanx
from tests.support.engines import on_cpu, text_and_frames
from wanx.bundle.reader import Bundle
from wanx.exporter.calibration.options import CalibrationOptions
from wanx.runtime.pipeline import Pipeline
from wanx.runtime.sessions import open_session
from wanx.runtime.sessions.tensorrt.session import TensorRTSession
from wanx.runtime.tokens import rope_tables

pytestmark = pytest.mark.gpu
PROMPT = "a red circle moving right on a blue background"


@pytest.fixture(scope="module", params=["bf16", "int8", "fp8"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The built-in model with engines for this GPU, by whichever TensorRT is installed."""
    from wanx.runtime.sessions.device.cuda import open_cuda

    cuda = open_cuda("rtx")
    sm = cuda.sm
    cuda.close()
    target = "tensorrt" if find_spec("tensorrt") else f"rtx:{sm}"
    return wanx.export(
        "tiny", tmp_path_factory.mktemp("tensorrt") / "b", precision=request.param, target=target,
        gate=True, calibration=CalibrationOptions(prompts=1, steps=3, golden_steps=2),
    )  # fmt: skip


def cosine(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.vdot(found, wanted) / np.linalg.norm(found) / np.linalg.norm(wanted))


def velocities(
    bundle: Bundle, grid: tuple[int, int, int], runs: int, streamed: int = 0
) -> list[np.ndarray]:
    """As many runs, whose inputs differ, with the weights of so many blocks streamed."""
    dit = bundle.manifest.config.dit
    cos, sin = rope_tables(grid, dit.rope_dims)
    found = []
    with open_session(bundle, "dit") as session:
        if streamed:
            assert isinstance(session, TensorRTSession)
            weights = session._engine._weights
            weights.fit(weights._bytes(streamed))
            assert weights.streamed == streamed
        session.bind({"rope_cos": cos, "rope_sin": sin})
        for seed in range(runs):
            generator = np.random.default_rng(seed)
            shapes = {
                "tokens": (1, int(np.prod(grid)), dit.token_dim),
                "context": (1, dit.text_len, dit.text_dim),
            }
            feeds: dict[str, Any] = {
                name: generator.standard_normal(shape, dtype=np.float32)
                for name, shape in shapes.items()
            }
            feeds["timestep"] = np.array([generator.uniform(1, 999)], np.float32)
            found.append(session.run(feeds)["velocity"])
    return found


@pytest.mark.parametrize("grid", [(5, 4, 4), (2, 5, 3)])
def test_the_denoiser(
    built: Bundle, grid: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded runs (from the third on) answer like the others."""
    recorded = velocities(built, grid, 6)
    monkeypatch.setenv("WANX_CUDA_GRAPHS", "0")
    one_by_one = velocities(built, grid, 6)
    for captured, launched, wanted in zip(
        recorded, one_by_one, velocities(on_cpu(built), grid, 6), strict=True
    ):
        np.testing.assert_array_equal(captured, launched)
        assert cosine(captured, wanted) >= 0.99


def test_streamed_weights(built: Bundle) -> None:
    """Copies that overtake what reads them, or come too late, would change what comes out."""
    for streamed in (3, built.manifest.config.dit.num_layers):
        for found, wanted in zip(
            velocities(built, (5, 4, 4), 8, streamed), velocities(built, (5, 4, 4), 8), strict=True
        ):
            np.testing.assert_array_equal(found, wanted)


def test_text_and_carried_state(built: Bundle) -> None:
    answers = (text_and_frames(bundle) for bundle in (built, on_cpu(built)))
    for found, wanted, least in zip(*answers, (0.98, 0.999, 0.999, 0.999), strict=True):
        assert found.shape == wanted.shape
        assert cosine(found, wanted) >= least


def test_a_whole_video(built: Bundle) -> None:
    """The same seed gives the same video."""
    made = [Pipeline(built)(PROMPT, seed=3, steps=6).frames for _ in range(2)]
    assert made[0] is not None
    assert made[1] is not None
    np.testing.assert_array_equal(made[0], made[1])


def test_all_memory_comes_back(built: Bundle) -> None:
    from wanx.runtime.sessions.device.cuda import open_cuda

    cuda = open_cuda("rtx")
    velocities(built, (5, 4, 4), 3)  # what TensorRT and CUDA load once
    before = cuda.free_memory()
    for _ in range(3):
        velocities(built, (5, 4, 4), 3)
    assert cuda.free_memory() >= before - (64 << 20)
    cuda.close()
