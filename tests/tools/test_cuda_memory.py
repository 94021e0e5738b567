"""The memory of a graph's values, by hand."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from benchmarks.cuda_memory import peak_bytes, predict
from wanx.config.models import PRESETS


def model(nodes: list[onnx.NodeProto], inputs: dict[str, list[str | int]]) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()]
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    weight = helper.make_tensor("w", TensorProto.FLOAT, [8, 32], [0.0] * 256)
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [-1, 8])
    graph = helper.make_graph(nodes, "graph", values, [result], [weight, shape])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


def test_values_are_freed_behind_their_last_use() -> None:
    """x and the widest pair: a of 32 columns and its square root."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Sqrt", ["a"], ["b"]),
        helper.make_node("ReduceSum", ["b"], ["c"], keepdims=0),
        helper.make_node("Neg", ["c"], ["y"]),
    ]
    assert peak_bytes(model(nodes, {"x": ["L", 8]}), {"L": 10}) == 4 * 10 * (8 + 32 + 32)


def test_a_view_holds_what_it_shows() -> None:
    """A reshaped value takes nothing, and keeps what it is a view of."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Reshape", ["a", "shape"], ["v"]),
        helper.make_node("Neg", ["x"], ["n"]),
        helper.make_node("Exp", ["n"], ["e"]),
        helper.make_node("Concat", ["v", "e"], ["y"], axis=0),
    ]
    rows = 10
    held = 8 * rows + 32 * rows  # x and a
    joined = 4 * (held + 8 * rows + (4 * rows + rows) * 8)
    assert peak_bytes(model(nodes, {"x": ["L", 8]}), {"L": rows}) == joined


def test_an_output_may_be_a_view() -> None:
    """Then what it shows is held to the end."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Reshape", ["a", "shape"], ["y"]),
        helper.make_node("Exp", ["x"], ["b"]),
        helper.make_node("Neg", ["b"], ["c"]),
    ]
    assert peak_bytes(model(nodes, {"x": ["L", 8]}), {"L": 10}) == 4 * 10 * (8 + 32 + 8 + 8)


@pytest.mark.parametrize("preset", ["tiny", "tiny-i2v"])
def test_larger_videos_take_more(preset: str) -> None:
    small, large = (predict(PRESETS[preset], side, side, 17) for side in (64, 128))
    assert [row["component"] for row in small] == [row["component"] for row in large]
    for one, other in zip(small, large, strict=True):
        fixed = one["component"] in ("text_encoder", "image_encoder")
        assert (one["values_gb"] == other["values_gb"]) == fixed
        assert one["weights_bf16_gb"] == other["weights_bf16_gb"] >= one["weights_int8_gb"]
