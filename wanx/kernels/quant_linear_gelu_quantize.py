"""The first linear of a feed-forward network in 8 bits, and the GELU that makes its output 8-bit.

    y = (x8 · x_scale) (weight8 · weight_scale)ᵀ + bias
    q = saturate(round(gelu(y) / out_scale))

The arguments of :func:`wanx.kernels.quant_linear.quant_linear`, with a scalar x_scale, then those
of :func:`wanx.kernels.gelu_quantize.gelu_quantize`: out_scale is a scalar in fp32, q ``[..., N]``
int8 or float8_e4m3fn. It is one after the other, except that y stays in fp32 and is not rounded to
the dtype of bias in between. Where PyTorch's product is the faster one it is literally one after
the other. Rounding has no gradient, and neither has this op.
"""

from __future__ import annotations

import torch
from onnxscript import opset23 as op
from onnxscript import script
from torch import Tensor
from torch.library import triton_op

from wanx.kernels.gelu_quantize import gelu_quantize, gelu_quantize_reference
from wanx.kernels.gemm_8bit import launch_gemm_8bit, unsupported_reason
from wanx.kernels.launch import runs_reference
from wanx.kernels.quant_linear import quant_linear, quant_linear_reference, runs_triton
from wanx.kernels.registry import DOMAIN, Outputs, register


def quant_linear_gelu_quantize_reference(
    x8: Tensor,
    x_scale: Tensor,
    weight8: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    out_scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Compute the layer and its GELU in fp32 and quantise by ``out_scale``."""
    y = quant_linear_reference(x8, x_scale, weight8, weight_scale, bias.float())
    return gelu_quantize_reference(y, out_scale, dtype)


@script(DOMAIN, default_opset=op)
def QuantLinearGeluQuantize(  # type: ignore[no-untyped-def]
    x8, x_scale, weight8, weight_scale, bias, out_scale, dtype: int
):
    x = op.DequantizeLinear(x8, x_scale)
    weight = op.DequantizeLinear(weight8, weight_scale, axis=0)
    y = op.MatMul(x, op.Transpose(weight, perm=[1, 0])) + op.Cast(bias, to=1)
    return op.QuantizeLinear(op.Gelu(y, approximate="tanh"), out_scale, output_dtype=dtype)


@triton_op("wanx::quant_linear_gelu_quantize", mutates_args=())
def _quant_linear_gelu_quantize(
    x8: Tensor,
    x_scale: Tensor,
    weight8: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    out_scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    layer, extra = (weight8, weight_scale, bias), {"out_scale": out_scale, "dtype": dtype}
    if not runs_triton("quant_linear_gelu_quantize", x8, x_scale, *layer):
        return gelu_quantize(quant_linear(x8, x_scale, *layer), out_scale, dtype)
    reason = unsupported_reason(x8, x_scale, *layer, **extra)
    if runs_reference("quant_linear_gelu_quantize", reason, x8):
        return quant_linear_gelu_quantize_reference(x8, x_scale, *layer, out_scale, dtype)
    q = launch_gemm_8bit(x8.reshape(-1, x8.shape[-1]), x_scale, *layer, **extra)
    return q.view(*x8.shape[:-1], len(weight8))


@_quant_linear_gelu_quantize.register_fake
def _(
    x8: Tensor,
    x_scale: Tensor,
    weight8: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    out_scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    return x8.new_empty((*x8.shape[:-1], weight8.shape[0]), dtype=dtype)


def _outputs(
    x8: Tensor,
    x_scale: Tensor,
    weight8: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    out_scale: Tensor,
    dtype: torch.dtype,
) -> Outputs:
    return [(dtype, (*x8.shape[:-1], weight8.shape[0]))]


register(torch.ops.wanx.quant_linear_gelu_quantize.default, QuantLinearGeluQuantize, _outputs)


def quant_linear_gelu_quantize(
    x8: Tensor,
    x_scale: Tensor,
    weight8: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    out_scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Apply the layer and quantise its GELU; see the module's contract for shapes."""
    return _quant_linear_gelu_quantize(x8, x_scale, weight8, weight_scale, bias, out_scale, dtype)
