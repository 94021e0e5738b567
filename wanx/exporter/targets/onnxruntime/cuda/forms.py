"""Bodies for ONNX Runtime's CUDA kernels: 8 bits are how weights are stored, not how they multiply.

There is no kernel for products of 8 bits with a scale for each channel. So activations stay in the
16-bit type around, and a weight becomes that type, which holds 8-bit numbers exactly, when its
layer runs; the scale is applied to the sums in fp32. Sums without a scale leave the range of fp16.
``MatMulNBits`` has scales in the 16-bit type.
"""

# mypy: ignore-errors
from __future__ import annotations

from onnxscript import opset23 as op
from onnxscript import script
from onnxscript.values import Opset

from wanx.config.number_formats import UINT8
from wanx.kernels.registry import DOMAIN

MICROSOFT = Opset("com.microsoft", 1)
ZERO = UINT8.zero_point


@script(DOMAIN, default_opset=op)
def QuantLinear(x, x_scale, weight8, weight_scale, bias):  # type: ignore[no-untyped-def]
    weight = op.Transpose(op.CastLike(weight8, bias), perm=[1, 0])
    sums = op.MatMul(op.CastLike(x, bias), weight)
    return op.CastLike(op.Cast(sums, to=1) * weight_scale + op.Cast(bias, to=1), bias)


@script(DOMAIN, default_opset=op)
def QuantLinearRows(x, x_scale, weight8, weight_scale, bias):  # type: ignore[no-untyped-def]
    weight = op.Transpose(op.CastLike(weight8, bias), perm=[1, 0])
    sums = op.MatMul(op.CastLike(x, bias), weight)
    return op.CastLike(op.Cast(sums, to=1) * weight_scale + op.Cast(bias, to=1), bias)


@script(DOMAIN, default_opset=op)
def QuantizeRows(x):  # type: ignore[no-untyped-def]
    return op.Identity(x), op.Constant(value_float=1.0)


@script(DOMAIN, default_opset=op)
def WeightOnlyLinear(x, weight8, weight_scale):  # type: ignore[no-untyped-def]
    zero = op.CastLike(op.Constant(value_int=ZERO), x)
    weight = op.Transpose(op.CastLike(weight8, x) - zero, perm=[1, 0])
    return op.CastLike(op.Cast(op.MatMul(x, weight), to=1) * weight_scale, x)


@script(DOMAIN, default_opset=op)
def Attention(q, k, v, num_heads: int, scale: float):  # type: ignore[no-untyped-def]
    return MICROSOFT.MultiHeadAttention(q, k, v, num_heads=num_heads, scale=scale)


@script(DOMAIN, default_opset=op)
def QuantAttention(q, k, v, q_scale, k_scale, v_scale, num_heads: int, scale: float):  # type: ignore[no-untyped-def]
    return MICROSOFT.MultiHeadAttention(q, k, v, num_heads=num_heads, scale=scale)


BODIES = {
    function.name: function
    for function in (
        QuantLinear,
        QuantLinearRows,
        QuantizeRows,
        WeightOnlyLinear,
        Attention,
        QuantAttention,
    )
}
