"""Adaptive layer normalisation whose result is quantised to 8 bits.

    y = saturate(round((LN(x) · (1 + scale) + shift) / q_scale))

x ``[B, L, D]``; scale and shift ``[B, 1, D]`` or ``[1, 1, D]`` in fp32, as in
:mod:`wanx.kernels.adaln`; y ``[B, L, D]`` in int8 or float8_e4m3fn, rounded as in
:mod:`wanx.kernels.quantize`. q_scale is a scalar in fp32 in :func:`adaln_quantize`;
:func:`adaln_quantize_rows` finds one for each token, and returns them ``[B, L, 1]``, in e4m3 alone.
Everything before the rounding runs in fp32. Rounding has no gradient, and neither have these ops.
"""

from __future__ import annotations

import torch
from onnxscript import opset23 as op
from onnxscript import script
from torch import Tensor
from torch.library import triton_op

from wanx.kernels.adaln import adaln_reference, launch_adaln, unsupported_reason
from wanx.kernels.launch import runs_reference
from wanx.kernels.quantize import (
    E4M3_MAX,
    SMALLEST_AMAX,
    quantize_reference,
    quantize_rows_reference,
)
from wanx.kernels.registry import DOMAIN, Outputs, register

E4M3 = torch.float8_e4m3fn


def adaln_quantize_reference(
    x: Tensor, scale: Tensor, shift: Tensor, q_scale: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """Compute AdaLN in fp32 and quantise it by ``q_scale``."""
    return quantize_reference(adaln_reference(x.float(), scale, shift, eps), q_scale, dtype)


def adaln_quantize_rows_reference(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute AdaLN in fp32 and quantise each token to e4m3 by its own scale; return both."""
    return quantize_rows_reference(adaln_reference(x.float(), scale, shift, eps))


@script(DOMAIN, default_opset=op)
def AdaLNQuantize(x, scale, shift, q_scale, eps: float, dtype: int):  # type: ignore[no-untyped-def]
    one = op.Constant(value_float=1.0)
    ones = op.Expand(one, op.Shape(x, start=-1))
    normed = op.LayerNormalization(op.Cast(x, to=1), ones, axis=-1, epsilon=eps)
    return op.QuantizeLinear(normed * (scale + one) + shift, q_scale, output_dtype=dtype)


@script(DOMAIN, default_opset=op)
def AdaLNQuantizeRows(x, scale, shift, eps: float):  # type: ignore[no-untyped-def]
    one = op.Constant(value_float=1.0)
    ones = op.Expand(one, op.Shape(x, start=-1))
    normed = op.LayerNormalization(op.Cast(x, to=1), ones, axis=-1, epsilon=eps)
    y = normed * (scale + one) + shift
    amax = op.ReduceMax(op.Abs(y), op.Constant(value_ints=[-1]), keepdims=1)
    smallest = op.Constant(value_float=SMALLEST_AMAX)
    rows = op.Max(amax, smallest) / op.Constant(value_float=E4M3_MAX)
    return op.QuantizeLinear(y / rows, one, output_dtype=17), rows


@triton_op("wanx::adaln_quantize", mutates_args=())
def _adaln_quantize(
    x: Tensor, scale: Tensor, shift: Tensor, q_scale: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    reason = unsupported_reason(x, scale, shift, q_scale=q_scale, fp8=dtype == E4M3)
    if runs_reference("adaln_quantize", reason, x):
        return adaln_quantize_reference(x, scale, shift, q_scale, eps, dtype)
    return launch_adaln(x, scale, shift, eps, dtype=dtype, q_scale=q_scale)[1]


@_adaln_quantize.register_fake
def _(
    x: Tensor, scale: Tensor, shift: Tensor, q_scale: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


@triton_op("wanx::adaln_quantize_rows", mutates_args=())
def _adaln_quantize_rows(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    reason = unsupported_reason(x, scale, shift, fp8=True)
    if runs_reference("adaln_quantize_rows", reason, x):
        return adaln_quantize_rows_reference(x, scale, shift, eps)
    _, y, scales = launch_adaln(x, scale, shift, eps, dtype=E4M3, by_row=True)
    return y, scales


@_adaln_quantize_rows.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(x, dtype=E4M3),
        x.new_empty((*x.shape[:-1], 1), dtype=torch.float32),
    )


def _outputs(
    x: Tensor, scale: Tensor, shift: Tensor, q_scale: Tensor, eps: float, dtype: torch.dtype
) -> Outputs:
    return [(dtype, x.shape)]


def _rows_outputs(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Outputs:
    return [(E4M3, x.shape), (torch.float32, (*x.shape[:-1], 1))]


register(torch.ops.wanx.adaln_quantize.default, AdaLNQuantize, _outputs)
register(torch.ops.wanx.adaln_quantize_rows.default, AdaLNQuantizeRows, _rows_outputs)


def adaln_quantize(
    x: Tensor, scale: Tensor, shift: Tensor, q_scale: Tensor, *, eps: float, dtype: torch.dtype
) -> Tensor:
    """Normalise, modulate and quantise ``x``; see the module's contract for shapes."""
    return _adaln_quantize(x, scale, shift, q_scale, eps, dtype)


def adaln_quantize_rows(
    x: Tensor, scale: Tensor, shift: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    """Normalise and modulate ``x``, quantise each token by its own scale; return both."""
    return _adaln_quantize_rows(x, scale, shift, eps)
