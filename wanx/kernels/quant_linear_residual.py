"""The last linear of a sublayer in 8 bits, added to the residual stream through its gate.

    y = (x8 · x_scale) (weight8 · weight_scale)ᵀ + bias
    out = residual + y · gate

The arguments of :func:`wanx.kernels.quant_linear.quant_linear`, with x8 ``[B, L, K]`` and a scalar
x_scale, then those of :func:`wanx.kernels.gated_residual.gated_residual`: residual ``[B, L, N]`` in
any floating dtype, which out shares, gate ``[B, 1, N]``, or ``[1, 1, N]`` for the whole batch, in
fp32. It is one after the other, except that y stays in fp32 and is not rounded to the dtype of bias
in between. Where PyTorch's product is the faster one it is literally one after the other.
"""

from __future__ import annotations

import torch
from onnxscript import opset23 as op
from onnxscript import script
from torch import Tensor
from torch.library import triton_op

from wanx.kernels.gated_residual import gated_residual, gated_residual_reference
from wanx.kernels.gemm_8bit import launch_gemm_8bit, unsupported_reason
from wanx.kernels.launch import runs_reference
from wanx.kernels.quant_linear import quant_linear, quant_linear_reference, runs_triton
from wanx.kernels.registry import DOMAIN, Outputs, needs_gradient, register


def quant_linear_residual_reference(
    x8: Tensor,
    x_scale: Tensor,
    weight8: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    residual: Tensor,
    gate: Tensor,
) -> Tensor:
    """Compute the layer and the update in fp32 and return the dtype of ``residual``."""
    y = quant_linear_reference(x8, x_scale, weight8, weight_scale, bias.float())
    return gated_residual_reference(residual, y, gate)


@script(DOMAIN, default_opset=op)
def QuantLinearResidual(  # type: ignore[no-untyped-def]
    x8, x_scale, weight8, weight_scale, bias, residual, gate
):
    x = op.DequantizeLinear(x8, x_scale)
    weight = op.DequantizeLinear(weight8, weight_scale, axis=0)
    y = op.MatMul(x, op.Transpose(weight, perm=[1, 0])) + op.Cast(bias, to=1)
    return op.CastLike(op.Cast(residual, to=1) + y * gate, residual)


@triton_op("wanx::quant_linear_residual", mutates_args=())
def _quant_linear_residual(
    x8: Tensor,
    x_scale: Tensor,
    weight8: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    residual: Tensor,
    gate: Tensor,
) -> Tensor:
    layer, extra = (weight8, weight_scale, bias), {"residual": residual, "gate": gate}
    if not runs_triton("quant_linear_residual", x8, x_scale, *layer):
        return gated_residual(residual, quant_linear(x8, x_scale, *layer), gate)
    reason = unsupported_reason(x8, x_scale, *layer, **extra)
    if runs_reference("quant_linear_residual", reason, x8):
        return quant_linear_residual_reference(x8, x_scale, *layer, residual, gate)
    return launch_gemm_8bit(x8.reshape(-1, x8.shape[-1]), x_scale, *layer, **extra)


@_quant_linear_residual.register_fake
def _(
    x8: Tensor,
    x_scale: Tensor,
    weight8: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    residual: Tensor,
    gate: Tensor,
) -> Tensor:
    return torch.empty_like(residual)


def _outputs(
    x8: Tensor,
    x_scale: Tensor,
    weight8: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    residual: Tensor,
    gate: Tensor,
) -> Outputs:
    return [(residual.dtype, residual.shape)]


register(torch.ops.wanx.quant_linear_residual.default, QuantLinearResidual, _outputs)


def quant_linear_residual(
    x8: Tensor,
    x_scale: Tensor,
    weight8: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    residual: Tensor,
    gate: Tensor,
) -> Tensor:
    """Add the layer's gated output to the stream; see the module's contract for shapes."""
    values = (x8, x_scale, weight8, weight_scale, bias, residual, gate)
    if needs_gradient(x_scale, weight_scale, bias, residual, gate):
        return quant_linear_residual_reference(*values)
    return _quant_linear_residual(*values)
