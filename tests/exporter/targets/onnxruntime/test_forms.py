"""Layers with weights of 8 bits on ONNX Runtime, against exact arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto

from tests.support.onnx_runs import optimised
from wanx.exporter.components import ComponentSpec, GraphInput
from wanx.exporter.graph.trace import trace
from wanx.exporter.targets.onnxruntime.graph import optimize_for_ort
from wanx.models.quantized import WeightOnlyLinear
from wanx.runtime.sessions.onnxruntime.loading import session_options

SIZES = [(1, 24, 40), (45, 33, 7), (3, 1, 1), (17, 1025, 130)]  # rows, K, N
FAINT = 2.0**-126


def build(weight: NDArray[np.uint8], scale: NDArray[np.float32], path: Path) -> None:
    n, k = weight.shape
    spec = ComponentSpec(
        name="module", weights="module", outputs=("y",), axes={"L": 24},
        build=lambda: WeightOnlyLinear(k, n, bias=False),
        inputs=(GraphInput(name="x", shape=(1, "L", k)),),
    )  # fmt: skip
    model = trace(spec)
    for name, value in (("weight", weight), ("weight_scale", scale)):
        model.graph.initializers[name].const_value = ir.tensor(value, name=name)
    assert optimize_for_ort(model)
    path.write_bytes(ir.to_proto(model).SerializeToString())


def run(path: Path, x: NDArray[np.float32]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(
        path.read_bytes(),
        session_options(path.parent, threads=1),
        providers=["CPUExecutionProvider"],
    )
    result: NDArray[np.float32] = session.run(None, {"x": x})[0]
    return result


@pytest.fixture(params=SIZES, ids=str)
def size(request: pytest.FixtureRequest) -> tuple[int, int, int]:
    value: tuple[int, int, int] = request.param
    return value


def test_integers_are_exact(size: tuple[int, int, int], tmp_path: Path) -> None:
    """No sum saturates, on any processor: weights and digits at both ends of their ranges."""
    rows, k, n = size
    rng = np.random.default_rng(0)
    weight = rng.choice(np.array([1, 2, 127, 128, 129, 254, 255], np.uint8), (n, k))
    x = rng.choice(np.array([-8191, -8128, -8127, -64, -1, 0, 64, 65, 8190, 8191]), (1, rows, k))
    x[..., 0] = 8191  # so that a step is 1
    build(weight, np.ones(n, np.float32), tmp_path / "engine.onnx")
    expected = x @ (weight.astype(np.int64) - 128).T
    y = run(tmp_path / "engine.onnx", x.astype(np.float32))
    np.testing.assert_allclose(y, expected, rtol=2e-7, atol=1)  # fp32 itself rounds above 2^24


@pytest.mark.parametrize("outlier", [1.0, 1e3, 1e30])
def test_activations_have_14_bits(
    size: tuple[int, int, int], outlier: float, tmp_path: Path
) -> None:
    rows, k, n = size
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, rows, k)).astype(np.float32)
    x[:, -1] = 0
    x[:, ::2, k // 2] *= outlier
    weight = rng.integers(1, 256, (n, k), dtype=np.uint8)
    scale = (rng.random(n) * 0.01 + 1e-4).astype(np.float32)
    build(weight, scale, tmp_path / "engine.onnx")
    wide = (weight.astype(np.float64) - 128) * scale[:, None]
    half_step = np.abs(x.astype(np.float64)).max(-1, keepdims=True) / 8191 / 2
    bound = half_step * np.abs(wide).sum(-1) * 1.01
    assert (np.abs(run(tmp_path / "engine.onnx", x) - x.astype(np.float64) @ wide.T) <= bound).all()


def test_the_faintest_row(tmp_path: Path) -> None:
    """Neither a faint activation nor a faint scale becomes nothing, or not a number."""
    x = np.array([[[FAINT * 2**20, 0.0], [1.0, -1.0]]], np.float32)
    scale = np.array([1.0, FAINT], np.float32)
    build(np.array([[255, 128], [1, 255]], np.uint8), scale, tmp_path / "engine.onnx")
    expected = [[[127 * FAINT * 2**20, 0], [127, -254 * FAINT]]]
    np.testing.assert_allclose(run(tmp_path / "engine.onnx", x), expected, rtol=1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(value: float, tmp_path: Path) -> None:
    x = np.ones((1, 2, 5), np.float32)
    x[0, 1, 3] = value
    weight, scale = np.full((3, 5), 130, np.uint8), np.ones(3, np.float32)
    build(weight, scale, tmp_path / "engine.onnx")
    y = run(tmp_path / "engine.onnx", x)
    assert np.isfinite(y[0, 0]).all()
    assert not np.isfinite(y[0, 1]).any()


def test_the_weight_stays_as_it_is_stored(tmp_path: Path) -> None:
    """Neither wide nor turned nor packed, whatever ONNX Runtime's optimisers think of it."""
    weight, scale = np.full((40, 24), 130, np.uint8), np.ones(40, np.float32)
    build(weight, scale, tmp_path / "engine.onnx")
    graph = optimised(tmp_path / "engine.onnx", tmp_path)
    kept = {tuple(t.dims): t.data_type for t in graph.initializer if len(t.dims) == 2}
    assert kept == {(40, 24): TensorProto.UINT8}
    (product,) = (node for node in graph.node if "MatMul" in node.op_type)
    assert product.op_type == "MatMulInteger"
    assert product.input[0] in {t.name for t in graph.initializer}
