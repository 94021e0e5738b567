"""A linear layer in 8 bits.

    y = (x8 · x_scale) (weight8 · weight_scale)ᵀ + bias

x8 ``[..., K]`` and weight8 ``[N, K]``, both int8 or both float8_e4m3fn; weight_scale ``[N]``, or
``[]`` for the whole tensor; bias ``[N]``; y ``[..., N]`` in the dtype of bias. x_scale is a scalar
in :func:`quant_linear` and ``[..., 1]``, one per row, in :func:`quant_linear_rows`. Scales are in
fp32. The reference accumulates in fp32.

The ONNX functions dequantise to the dtype of bias, the pattern that runtimes replace by an 8-bit
product; one that does not know it computes the same numbers in that dtype. DequantizeLinear has no
scale per row, so there the product is scaled instead.
"""

from __future__ import annotations

import torch
from onnxscript import opset23 as op
from onnxscript import script
from torch import Tensor
from torch.nn import functional as F

from wanx.kernels.registry import DOMAIN, Outputs, needs_gradient, register


def dequantized_weight(weight8: Tensor, weight_scale: Tensor) -> Tensor:
    """The weight ``[N, K]`` in fp32; its scale is ``[N]`` or ``[]``."""
    return weight8.float() * weight_scale.float().reshape(-1, 1)


def quant_linear_reference(
    x8: Tensor, x_scale: Tensor, weight8: Tensor, weight_scale: Tensor, bias: Tensor
) -> Tensor:
    """Compute either layer in fp32 and return it in the dtype of ``bias``."""
    x = x8.float() * x_scale.float()
    y = F.linear(x, dequantized_weight(weight8, weight_scale), bias.float())
    return y.to(bias.dtype)


@script(DOMAIN, default_opset=op)
def QuantLinear(x8, x_scale, weight8, weight_scale, bias):  # type: ignore[no-untyped-def]
    x = op.DequantizeLinear(x8, op.CastLike(x_scale, bias))
    weight = op.DequantizeLinear(weight8, op.CastLike(weight_scale, bias), axis=0)
    return op.MatMul(x, op.Transpose(weight, perm=[1, 0])) + bias


@script(DOMAIN, default_opset=op)
def QuantLinearRows(x8, x_scale, weight8, weight_scale, bias):  # type: ignore[no-untyped-def]
    x = op.DequantizeLinear(x8, op.CastLike(op.Constant(value_float=1.0), bias))
    weight = op.DequantizeLinear(weight8, op.CastLike(weight_scale, bias), axis=0)
    y = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
    return op.CastLike(op.Cast(y, to=1) * x_scale + op.Cast(bias, to=1), bias)


@torch.library.custom_op("wanx::quant_linear", mutates_args=())
def _quant_linear(
    x8: Tensor, x_scale: Tensor, weight8: Tensor, weight_scale: Tensor, bias: Tensor
) -> Tensor:
    return quant_linear_reference(x8, x_scale, weight8, weight_scale, bias)


@torch.library.custom_op("wanx::quant_linear_rows", mutates_args=())
def _quant_linear_rows(
    x8: Tensor, x_scale: Tensor, weight8: Tensor, weight_scale: Tensor, bias: Tensor
) -> Tensor:
    return quant_linear_reference(x8, x_scale, weight8, weight_scale, bias)


@_quant_linear.register_fake
@_quant_linear_rows.register_fake
def _(x8: Tensor, x_scale: Tensor, weight8: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    return bias.new_empty((*x8.shape[:-1], weight8.shape[0]))


def _outputs(
    x8: Tensor, x_scale: Tensor, weight8: Tensor, weight_scale: Tensor, bias: Tensor
) -> Outputs:
    return [(bias.dtype, (*x8.shape[:-1], weight8.shape[0]))]


register(torch.ops.wanx.quant_linear.default, QuantLinear, _outputs)
register(torch.ops.wanx.quant_linear_rows.default, QuantLinearRows, _outputs)


def quant_linear(
    x8: Tensor, x_scale: Tensor, weight8: Tensor, weight_scale: Tensor, bias: Tensor
) -> Tensor:
    """Apply the layer to an input of one scale; see the module's contract for shapes."""
    if needs_gradient(x_scale, weight_scale, bias):
        return quant_linear_reference(x8, x_scale, weight8, weight_scale, bias)
    return _quant_linear(x8, x_scale, weight8, weight_scale, bias)


def quant_linear_rows(
    x8: Tensor, x_scale: Tensor, weight8: Tensor, weight_scale: Tensor, bias: Tensor
) -> Tensor:
    """Apply the layer to an input of one scale per row; see the module's contract for shapes."""
    if needs_gradient(x_scale, weight_scale, bias):
        return quant_linear_reference(x8, x_scale, weight8, weight_scale, bias)
    return _quant_linear_rows(x8, x_scale, weight8, weight_scale, bias)
