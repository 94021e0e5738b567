"""What the processor runs instead of an op, against the op's reference and the portable graph."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from tests.support.eightbit import SMALL, Built, build, make_recipe, random_feeds, random_weights
from tests.support.onnx_runs import optimised
from tests.support.peers import relative_error
from wanx.config.models import DiTConfig
from wanx.exporter.targets.onnxruntime.graph import optimize_for_ort
from wanx.exporter.targets.onnxruntime.profile import profile_products
from wanx.kernels.attention.op import Attention, BiasedAttention, attention_reference
from wanx.kernels.quant_linear import QuantLinear
from wanx.runtime.sessions.onnxruntime import loading as sessions
from wanx.runtime.sessions.onnxruntime.loading import create_session


def build_model(heads: int, scale: float, *, biased: bool = False) -> ir.Model:
    function = BiasedAttention if biased else Attention
    names = ["q", "k", "v", "bias"][: 4 if biased else 3]
    node = helper.make_node(
        function.name, names, ["o"], domain="wanx", num_heads=heads, scale=scale
    )
    graph = helper.make_graph(
        [node],
        "attention",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["B", n, "D"]) for n in names],
        [helper.make_tensor_value_info("o", TensorProto.FLOAT, ["B", "q", "D"])],
    )
    model = helper.make_model(
        graph,
        functions=[function.to_function_proto()],
        opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("wanx", 1)],
        ir_version=10,
    )
    return ir.from_proto(model)


# (queries, keys, heads, width of a head); the last two are longer than one block of the kernel.
@pytest.mark.parametrize(
    "size",
    [(1, 1, 1, 24), (7, 7, 3, 24), (45, 512, 3, 24), (1000, 77, 2, 32), (1331, 1331, 1, 128)],
)
def test_specialised_attention(size: tuple[int, int, int, int]) -> None:
    queries, keys, heads, width = size
    model = build_model(heads, 0.3)
    assert optimize_for_ort(model)
    (body,) = model.functions.values()
    assert [(node.domain, node.op_type) for node in body] == [
        ("com.microsoft", "MultiHeadAttention")
    ]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    torch.manual_seed(0)
    values = [torch.randn(1, length, heads * width) for length in (queries, keys, keys)]
    feeds = dict(zip("qkv", (value.numpy() for value in values), strict=True))
    (out,) = session.run(None, feeds)
    expected = attention_reference(*values, None, heads, 0.3)
    assert out.dtype == np.float32
    assert relative_error(out, expected) <= 1e-5


def test_a_model_without_attention_stays_as_it_is() -> None:
    model = build_model(2, 1.0, biased=True)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert not optimize_for_ort(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def build_linear(
    weight: np.ndarray, x_scale: float, scales: np.ndarray, bias: np.ndarray
) -> ir.Model:
    """Quantise an input in a node of its own, and multiply it in a ``QuantLinear``."""
    constants = {
        "x_scale": np.float32(x_scale),
        "weight": weight,
        "weight_scale": scales,
        "bias": bias,
    }
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "x_scale"], ["x8"], output_dtype=3),
            helper.make_node("QuantLinear", ["x8", *constants], ["y"], domain="wanx"),
        ],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "L", weight.shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "L", weight.shape[0]])],
        [onnx.numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()],
    )
    model = helper.make_model(
        graph,
        functions=[QuantLinear.to_function_proto()],
        opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("wanx", 1)],
        ir_version=11,
    )
    return ir.from_proto(model)


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("size", [(1, 1, 1), (7, 13, 5), (19, 257, 66), (130, 1030, 33)])
@pytest.mark.parametrize("saturates", [False, True], ids=["as it is", "without VNNI"])
def test_specialised_int8_linear(
    size: tuple[int, int, int],
    extreme: bool,
    saturates: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The integer sum is exact, also where all numbers are the largest; (rows, K, N)."""
    if saturates:
        monkeypatch.setattr(sessions, "_saturates", lambda: True)
    rows, k, n = size
    generator = np.random.default_rng(0)
    numbers = np.array([-127, 127]) if extreme else np.arange(-127, 128)
    weight = generator.choice(numbers, (n, k)).astype(np.int8)
    x8 = generator.choice([-128, 127] if extreme else np.arange(-128, 128), (1, rows, k))
    if extreme:
        weight[0], x8[0, 0], x8[0, -1] = 127, 127, -128
    scales = generator.uniform(0.001, 0.1, n).astype(np.float32)
    bias = generator.standard_normal(n, dtype=np.float32)
    model = build_linear(weight, 0.5, scales, bias)
    assert optimize_for_ort(model)
    path = tmp_path / "linear.onnx"
    path.write_bytes(ir.to_proto(model).SerializeToString())
    session = create_session(path, tmp_path, threads=1)
    x = (0.5 * x8).astype(np.float32)
    x[x8 == 127] = 1e9  # beyond the range of 8 bits
    (y,) = session.run(None, {"x": x})
    exact = (x8.astype(np.int64) @ weight.astype(np.int64).T) * (0.5 * scales.astype(np.float64))
    np.testing.assert_allclose(y, exact + bias, rtol=1e-5, atol=1e-4)
    kept = {t.data_type for t in optimised(path, tmp_path).initializer if len(t.dims) == 2}
    assert not saturates or kept == {TensorProto.UINT8}


def build_network(folder: Path, config: DiTConfig, scheme: str) -> Built:
    weights, feeds = random_weights(config), random_feeds(config)
    return build(folder, config, weights, make_recipe(config, weights, feeds, scheme))


def test_an_int8_network_multiplies_integers(tmp_path: Path) -> None:
    """Every input is rounded once for all layers that read it, and no weight is dequantised."""
    built = build_network(tmp_path, SMALL, "int8")
    layers, blocks = len(built.recipe.layers), SMALL.num_layers
    assert layers == 10 * blocks
    nodes = Counter(node.op_type for node in optimised(built.engine, tmp_path).node)
    assert nodes["MatMulIntegerToFloat"] == layers
    # Six a block, and the text, which is the same for all blocks and here has one scale.
    assert nodes["QuantizeLinear"] == 6 * blocks + 1
    assert nodes["DequantizeLinear"] == 0

    before = sorted(path.name for path in tmp_path.iterdir())
    products = profile_products(built.spec, built.engine, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert products.pop("MultiHeadAttention") == 2 * blocks
    assert products.pop("MatMulIntegerToFloat") == layers
    # Outside the blocks: patches, text (2), time (2), modulation, head.
    assert products.keys() <= {"MatMul", "Gemm", "FusedMatMul"}
    assert sum(products.values()) == 7

    for length in (1, 13):
        feeds = random_feeds(SMALL, length)
        portable, engine = (built.run(feeds, engine=engine) for engine in (False, True))
        assert relative_error(engine, portable) <= 1e-5


def test_an_fp8_network(tmp_path: Path) -> None:
    """The processor has no products in fp8; the numbers are those of the portable graph."""
    config = replace(SMALL, num_layers=1)
    built = build_network(tmp_path, config, "fp8")
    assert "MatMulIntegerToFloat" not in profile_products(built.spec, built.engine, tmp_path)
    feeds = random_feeds(config, 45)
    portable, engine = (built.run(feeds, engine=engine) for engine in (False, True))
    assert relative_error(engine, portable) <= 1e-5
