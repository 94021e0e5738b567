"""The processor's own attention against the op's reference."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from peers import relative_error

from wanx.export.targets.onnxruntime import specialise
from wanx.kernels.attention import Attention, BiasedAttention, attention_reference


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
    assert specialise(model)
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
    assert not specialise(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
