"""A linear layer with a weight in 8 bits and everything else as it was.

    y = x ((weight8 - 128) · weight_scale)ᵀ + bias

x ``[..., K]`` in any floating dtype; weight8 ``[N, K]`` in uint8; weight_scale ``[N]`` or ``[]`` in
fp32; bias ``[N]``, optional. The product runs in fp32 (on a GPU in bf16 where x is bf16, with sums
in fp32); y ``[..., N]`` has the dtype of x.
"""

from __future__ import annotations

import torch
from onnxscript import opset23 as op
from onnxscript import script
from torch import Tensor
from torch.library import triton_op
from torch.nn import functional as F

from wanx.config.number_formats import UINT8
from wanx.kernels.quant_linear import dequantized_weight
from wanx.kernels.registry import DOMAIN, Outputs, needs_gradient, register

ZERO = UINT8.zero_point


def weight_only_linear_reference(x: Tensor, weight8: Tensor, weight_scale: Tensor) -> Tensor:
    """Compute the product in fp32 and return it in the dtype of ``x``."""
    weight = dequantized_weight(weight8.float() - ZERO, weight_scale)
    return F.linear(x.float(), weight).to(x.dtype)


@script(DOMAIN, default_opset=op)
def WeightOnlyLinear(x, weight8, weight_scale):  # type: ignore[no-untyped-def]
    zero = op.CastLike(op.Constant(value_int=ZERO), weight8)
    zeros = op.Expand(zero, op.Shape(weight_scale))
    weight = op.DequantizeLinear(weight8, op.CastLike(weight_scale, x), zeros, axis=0)
    return op.MatMul(x, op.Transpose(weight, perm=[1, 0]))


@triton_op("wanx::weight_only_linear", mutates_args=())
def _weight_only_linear(x: Tensor, weight8: Tensor, weight_scale: Tensor) -> Tensor:
    if not x.is_cuda or x.dtype == torch.float16:  # whose range unscaled sums would leave
        return weight_only_linear_reference(x, weight8, weight_scale)
    # An 8-bit number is exact in 16 bits, so the weight need not be widened to fp32.
    product = F.linear(x, weight8.to(x.dtype) - ZERO).float()
    return (product * weight_scale.float()).to(x.dtype)


@_weight_only_linear.register_fake
def _(x: Tensor, weight8: Tensor, weight_scale: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight8.shape[0]))


def _outputs(x: Tensor, weight8: Tensor, weight_scale: Tensor) -> Outputs:
    return [(x.dtype, (*x.shape[:-1], weight8.shape[0]))]


register(torch.ops.wanx.weight_only_linear.default, WeightOnlyLinear, _outputs)


def weight_only_linear(
    x: Tensor, weight8: Tensor, weight_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Apply the layer to ``x``; see the module's contract for shapes."""
    if needs_gradient(x, weight_scale):
        y = weight_only_linear_reference(x, weight8, weight_scale)
    else:
        y = _weight_only_linear(x, weight8, weight_scale)
    return y if bias is None else (y + bias).to(x.dtype)
