"""Gated residual update and the adaptive layer normalisation of its result, in one pass.

    x' = x + z · gate                      y = LN(x') · (1 + scale) + shift

x ``[B, L, D]`` is the residual stream, z ``[B, L, D]`` the output of a sublayer in the compute
dtype; gate, scale and shift ``[B, 1, D]``, or ``[1, 1, D]`` for the whole batch, in fp32. All
arithmetic runs in fp32, and LN reads x' before it is rounded. x' has the dtype of x, y that of z;
in :func:`residual_adaln_quantize` y is quantised by the scalar q_scale, as in
:mod:`wanx.kernels.adaln_quantize`, and has no gradient.
"""

from __future__ import annotations

import torch
from onnxscript import opset23 as op
from onnxscript import script
from torch import Tensor
from torch.library import triton_op

from wanx.kernels.adaln import adaln_reference, launch_adaln, unsupported_reason
from wanx.kernels.launch import runs_reference
from wanx.kernels.quantize import quantize_reference
from wanx.kernels.registry import DOMAIN, Outputs, needs_gradient, register


def residual_adaln_reference(
    x: Tensor, z: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute in fp32 and return x' and y in the dtypes of ``x`` and ``z``."""
    updated = x.float() + z.float() * gate.float()
    return updated.to(x.dtype), adaln_reference(updated, scale, shift, eps).to(z.dtype)


def residual_adaln_quantize_reference(
    x: Tensor,
    z: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    q_scale: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Compute in fp32 and return x' in the dtype of ``x``, and y quantised by ``q_scale``."""
    updated = x.float() + z.float() * gate.float()
    y = adaln_reference(updated, scale, shift, eps)
    return updated.to(x.dtype), quantize_reference(y, q_scale, dtype)


@script(DOMAIN, default_opset=op)
def ResidualAdaLN(x, z, gate, scale, shift, eps: float):  # type: ignore[no-untyped-def]
    updated = op.Cast(x, to=1) + op.Cast(z, to=1) * gate
    one = op.Constant(value_float=1.0)
    ones = op.Expand(one, op.Shape(x, start=-1))
    normed = op.LayerNormalization(updated, ones, axis=-1, epsilon=eps)
    return op.CastLike(updated, x), op.CastLike(normed * (scale + one) + shift, z)


@script(DOMAIN, default_opset=op)
def ResidualAdaLNQuantize(x, z, gate, scale, shift, q_scale, eps: float, dtype: int):  # type: ignore[no-untyped-def]
    updated = op.Cast(x, to=1) + op.Cast(z, to=1) * gate
    one = op.Constant(value_float=1.0)
    ones = op.Expand(one, op.Shape(x, start=-1))
    normed = op.LayerNormalization(updated, ones, axis=-1, epsilon=eps)
    y = op.QuantizeLinear(normed * (scale + one) + shift, q_scale, output_dtype=dtype)
    return op.CastLike(updated, x), y


@triton_op("wanx::residual_adaln", mutates_args=())
def _residual_adaln(
    x: Tensor, z: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    reason = unsupported_reason(x, gate, scale, shift, z=z)
    if runs_reference("residual_adaln", reason, x):
        return residual_adaln_reference(x, z, gate, scale, shift, eps)
    updated, y, _ = launch_adaln(x, scale, shift, eps, dtype=z.dtype, z=z, gate=gate)
    return updated, y


@_residual_adaln.register_fake
def _(
    x: Tensor, z: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(z)


@triton_op("wanx::residual_adaln_quantize", mutates_args=())
def _residual_adaln_quantize(
    x: Tensor,
    z: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    q_scale: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    fp8 = dtype == torch.float8_e4m3fn
    reason = unsupported_reason(x, gate, scale, shift, z=z, q_scale=q_scale, fp8=fp8)
    if runs_reference("residual_adaln_quantize", reason, x):
        return residual_adaln_quantize_reference(x, z, gate, scale, shift, q_scale, eps, dtype)
    updated, y, _ = launch_adaln(x, scale, shift, eps, dtype=dtype, z=z, gate=gate, q_scale=q_scale)
    return updated, y


@_residual_adaln_quantize.register_fake
def _(
    x: Tensor,
    z: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    q_scale: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(z, dtype=dtype)


def _outputs(
    x: Tensor,
    z: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    q_scale: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Outputs:
    return [(x.dtype, x.shape), (dtype, z.shape)]


register(torch.ops.wanx.residual_adaln.default, ResidualAdaLN)
register(torch.ops.wanx.residual_adaln_quantize.default, ResidualAdaLNQuantize, _outputs)


def residual_adaln(
    x: Tensor, z: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    """Update the stream and normalise it; see the module's contract for shapes."""
    if needs_gradient(x, z, gate, scale, shift):
        return residual_adaln_reference(x, z, gate, scale, shift, eps)
    return _residual_adaln(x, z, gate, scale, shift, eps)


def residual_adaln_quantize(
    x: Tensor,
    z: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    q_scale: Tensor,
    *,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Update the stream, normalise and quantise it; see the module's contract for shapes."""
    return _residual_adaln_quantize(x, z, gate, scale, shift, q_scale, eps, dtype)
