"""Bodies of ``wanx::`` functions that TensorRT turns into 8-bit products.

TensorRT wants the scales of QuantizeLinear and DequantizeLinear while it builds. Here they are all
1, and the real ones are ordinary factors before and behind. So nothing in an engine depends on the
weights: they are its inputs, and the blocks of a network share one engine.

    q = round(x / scale)
    y = (x8 weight8ᵀ) · x_scale · weight_scale + bias

The raw sums of a product leave it in the 16-bit type around it, which must be bf16: fp16 overflows.
"""

# mypy: ignore-errors
from __future__ import annotations

from typing import Any

from onnxscript import OnnxFunction, script
from onnxscript import opset23 as op

from wanx.config.number_formats import FP8
from wanx.kernels.registry import DOMAIN

WEIGHT_SCALE = 1 / FP8.largest


@script(DOMAIN, default_opset=op)
def QuantLinear(x8, x_scale, weight8, weight_scale, bias):  # type: ignore[no-untyped-def]
    one = op.CastLike(op.Constant(value_float=1.0), bias)
    weight = op.Transpose(op.DequantizeLinear(weight8, one), perm=[1, 0])
    sums = op.Cast(op.MatMul(op.DequantizeLinear(x8, one), weight), to=1)
    return op.CastLike(sums * (x_scale * weight_scale) + op.Cast(bias, to=1), bias)


@script(DOMAIN, default_opset=op)
def QuantLinearRows(x8, x_scale, weight8, weight_scale, bias):  # type: ignore[no-untyped-def]
    one = op.CastLike(op.Constant(value_float=1.0), bias)
    weight = op.Transpose(op.DequantizeLinear(weight8, one), perm=[1, 0])
    sums = op.Cast(op.MatMul(op.DequantizeLinear(x8, one), weight), to=1)
    return op.CastLike(sums * x_scale * weight_scale + op.Cast(bias, to=1), bias)


@script(DOMAIN, default_opset=op)
def WeightOnlyLinear(x, weight8, weight_scale):  # type: ignore[no-untyped-def]
    weight = op.Transpose(op.CastLike(weight8, x), perm=[1, 0])
    return op.CastLike(op.Cast(op.MatMul(x, weight), to=1) * weight_scale, x)


@script(DOMAIN, default_opset=op)
def QuantLinearGeluQuantize(  # type: ignore[no-untyped-def]
    x8, x_scale, weight8, weight_scale, bias, out_scale, dtype: int
):
    one = op.CastLike(op.Constant(value_float=1.0), bias)
    weight = op.Transpose(op.DequantizeLinear(weight8, one), perm=[1, 0])
    sums = op.Cast(op.MatMul(op.DequantizeLinear(x8, one), weight), to=1)
    y = sums * (x_scale * weight_scale) + op.Cast(bias, to=1)
    y = op.Gelu(y, approximate="tanh") / out_scale
    return op.QuantizeLinear(y, op.Constant(value_float=1.0), output_dtype=dtype)


@script(DOMAIN, default_opset=op)
def QuantLinearResidual(  # type: ignore[no-untyped-def]
    x8, x_scale, weight8, weight_scale, bias, residual, gate
):
    one = op.CastLike(op.Constant(value_float=1.0), bias)
    weight = op.Transpose(op.DequantizeLinear(weight8, one), perm=[1, 0])
    sums = op.Cast(op.MatMul(op.DequantizeLinear(x8, one), weight), to=1)
    y = sums * (x_scale * weight_scale) + op.Cast(bias, to=1)
    return op.CastLike(op.Cast(residual, to=1) + y * gate, residual)


@script(DOMAIN, default_opset=op)
def AdaLNQuantize(x, scale, shift, q_scale, eps: float, dtype: int):  # type: ignore[no-untyped-def]
    one = op.Constant(value_float=1.0)
    ones = op.Expand(one, op.Shape(x, start=-1))
    normed = op.LayerNormalization(op.Cast(x, to=1), ones, axis=-1, epsilon=eps)
    y = (normed * (scale + one) + shift) / q_scale
    return op.QuantizeLinear(y, one, output_dtype=dtype)


@script(DOMAIN, default_opset=op)
def ResidualAdaLNQuantize(  # type: ignore[no-untyped-def]
    x, z, gate, scale, shift, q_scale, eps: float, dtype: int
):
    updated = op.Cast(x, to=1) + op.Cast(z, to=1) * gate
    one = op.Constant(value_float=1.0)
    ones = op.Expand(one, op.Shape(x, start=-1))
    normed = op.LayerNormalization(updated, ones, axis=-1, epsilon=eps)
    y = (normed * (scale + one) + shift) / q_scale
    return op.CastLike(updated, x), op.QuantizeLinear(y, one, output_dtype=dtype)


@script(DOMAIN, default_opset=op)
def GeluQuantize(x, scale, dtype: int):  # type: ignore[no-untyped-def]
    y = op.Gelu(op.Cast(x, to=1), approximate="tanh") / scale
    return op.QuantizeLinear(y, op.Constant(value_float=1.0), output_dtype=dtype)


@script(DOMAIN, default_opset=op)
def QuantAttention(q, k, v, q_scale, k_scale, v_scale, num_heads: int, scale: float):  # type: ignore[no-untyped-def]
    kept = op.Constant(value_ints=[0, 0])
    rest = op.Constant(value_ints=[-1])
    heads = op.Reshape(op.Constant(value_int=num_heads), op.Constant(value_ints=[1]))
    split = op.Concat(kept, heads, rest, axis=0)
    one = op.Constant(value_float=1.0)
    high = op.CastLike(one, q)
    q_heads = op.Transpose(op.Reshape(op.Cast(q, to=1) / q_scale, split), perm=[0, 2, 1, 3])
    k_heads = op.Transpose(op.Reshape(op.Cast(k, to=1) / k_scale, split), perm=[0, 2, 3, 1])
    v_heads = op.Transpose(op.Reshape(op.Cast(v, to=1) / v_scale, split), perm=[0, 2, 1, 3])
    q8 = op.QuantizeLinear(q_heads, one, output_dtype=17)
    k8 = op.QuantizeLinear(k_heads, one, output_dtype=17)
    v8 = op.QuantizeLinear(v_heads, one, output_dtype=17)
    scores = op.MatMul(op.DequantizeLinear(q8, high), op.DequantizeLinear(k8, high))
    factor = q_scale * k_scale * op.Constant(value_float=scale)
    weights = op.Softmax(op.Cast(scores, to=1) * factor, axis=-1)
    p_scale = op.Constant(value_float=WEIGHT_SCALE)
    p8 = op.QuantizeLinear(weights, p_scale, output_dtype=17)
    mixed = op.MatMul(
        op.DequantizeLinear(p8, op.CastLike(p_scale, q)), op.DequantizeLinear(v8, high)
    )
    packed = op.Concat(kept, rest, axis=0)
    out = op.Reshape(op.Transpose(mixed, perm=[0, 2, 1, 3]), packed)
    return op.CastLike(op.Cast(out, to=1) * v_scale, q)


@script(DOMAIN, default_opset=op)
def Attention(q, k, v, num_heads: int, scale: float):  # type: ignore[no-untyped-def]
    kept = op.Constant(value_ints=[0, 0])
    rest = op.Constant(value_ints=[-1])
    heads = op.Reshape(op.Constant(value_int=num_heads), op.Constant(value_ints=[1]))
    split = op.Concat(kept, heads, rest, axis=0)
    q_heads = op.Transpose(op.Reshape(q, split), perm=[0, 2, 1, 3])
    k_heads = op.Transpose(op.Reshape(k, split), perm=[0, 2, 3, 1])
    v_heads = op.Transpose(op.Reshape(v, split), perm=[0, 2, 1, 3])
    scores = op.Cast(op.MatMul(q_heads, k_heads), to=1) * op.Constant(value_float=scale)
    mixed = op.MatMul(op.CastLike(op.Softmax(scores, axis=-1), q), v_heads)
    packed = op.Concat(kept, rest, axis=0)
    return op.Reshape(op.Transpose(mixed, perm=[0, 2, 1, 3]), packed)


# There is no fused attention in fp32, nor for a head as wide as that of the VAE, and the operator
# is refused rather than taken apart.
DECOMPOSED: dict[str, OnnxFunction[..., Any]] = {Attention.name: Attention}
FUNCTION_BODIES: dict[str, OnnxFunction[..., Any]] = {
    function.name: function
    for function in (
        QuantLinear,
        QuantLinearRows,
        WeightOnlyLinear,
        QuantLinearGeluQuantize,
        QuantLinearResidual,
        AdaLNQuantize,
        ResidualAdaLNQuantize,
        GeluQuantize,
        QuantAttention,
    )
}
