"""Bodies for OpenVINO: newer operators of ONNX, and a layer with a weight of 8 bits."""

# mypy: ignore-errors
from __future__ import annotations

from onnxscript import opset23 as op
from onnxscript import script

from wanx.config.number_formats import UINT8
from wanx.kernels.registry import DOMAIN

ZERO = UINT8.zero_point


@script(DOMAIN, default_opset=op)
def PlainRMSNormalization(x, weight, axis: int, epsilon: float):  # type: ignore[no-untyped-def]
    square = op.ReduceMean(x * x, op.Constant(value_ints=[-1]))
    return x / op.Sqrt(square + op.Constant(value_float=epsilon)) * weight


@script(DOMAIN, default_opset=op)
def PlainRotaryEmbedding(x, cos, sin, interleaved: int, num_heads: int):  # type: ignore[no-untyped-def]
    heads = op.Reshape(op.Constant(value_int=num_heads), op.Constant(value_ints=[1]))
    pairs = op.Concat(
        op.Constant(value_ints=[0, 0]), heads, op.Constant(value_ints=[-1, 2]), axis=0
    )
    a, b = op.Split(op.Reshape(x, pairs), axis=-1, num_outputs=2)
    places = op.Constant(value_ints=[2, 4])
    c, s = op.Unsqueeze(cos, places), op.Unsqueeze(sin, places)
    turned = op.Concat(a * c - b * s, a * s + b * c, axis=-1)
    return op.Reshape(turned, op.Constant(value_ints=[0, 0, -1]))


@script(DOMAIN, default_opset=op)
def PlainAttention(q, k, v, bias, q_num_heads: int, kv_num_heads: int, scale: float):  # type: ignore[no-untyped-def]
    heads = op.Reshape(op.Constant(value_int=q_num_heads), op.Constant(value_ints=[1]))
    split = op.Concat(op.Constant(value_ints=[0, 0]), heads, op.Constant(value_ints=[-1]), axis=0)
    q_heads = op.Transpose(op.Reshape(q, split), perm=[0, 2, 1, 3])
    k_heads = op.Transpose(op.Reshape(k, split), perm=[0, 2, 3, 1])
    v_heads = op.Transpose(op.Reshape(v, split), perm=[0, 2, 1, 3])
    scores = op.MatMul(q_heads, k_heads) * op.Constant(value_float=scale) + bias
    mixed = op.MatMul(op.Softmax(scores, axis=-1), v_heads)
    return op.Reshape(op.Transpose(mixed, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))


@script(DOMAIN, default_opset=op)
def WeightOnlyLinear(x, weight8, weight_scale):  # type: ignore[no-untyped-def]
    column = op.Unsqueeze(weight_scale, op.Constant(value_ints=[1]))
    weight = (op.Cast(weight8, to=1) - op.Constant(value_float=float(ZERO))) * column
    return op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
