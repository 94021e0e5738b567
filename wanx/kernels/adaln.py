"""Adaptive layer normalisation.

    y = LN(x) · (1 + scale) + shift        LN(x) = (x - mean) / √(variance + eps), per token

x ``[B, L, D]``; scale and shift ``[B, 1, D]``, or ``[1, 1, D]`` for the whole batch, in fp32. The
statistics and the modulation run in fp32; y has the shape of x, and its dtype unless asked for
another, to which it is rounded once.

The kernel reads each token once. A program takes a few tokens, for which it keeps the modulation.
Its variants, in files of their own, update the residual stream first and round y to 8 bits.
"""

from __future__ import annotations

import torch
from onnxscript import opset23 as op
from onnxscript import script
from torch import Tensor
from torch.library import triton_op
from torch.nn import functional as F

from wanx.kernels.launch import (
    FLOATS,
    jit,
    launch,
    next_power_of_two,
    runs_reference,
    sm_of,
    tl,
    unsupported_tensors,
)
from wanx.kernels.launch_config import config
from wanx.kernels.quantize import is_scale, round_to_8bit, row_scale_of
from wanx.kernels.registry import DOMAIN, NODES, needs_gradient, register, register_node

MAX_DIM = 16384


def adaln_reference(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Compute AdaLN in fp32 and return it in the dtype of ``x``."""
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return (normed * (1 + scale.float()) + shift.float()).to(x.dtype)


def unsupported_reason(
    x: Tensor,
    *modulations: Tensor,
    z: Tensor | None = None,
    q_scale: Tensor | None = None,
    fp8: bool = False,
) -> str | None:
    """Reason why the kernel cannot run, or None.

    Args:
        x: the stream.
        modulations: scale, shift and gate, as far as the op has them.
        z: what is added to ``x``.
        q_scale: a static scale.
        fp8: whether the result is float8_e4m3fn.
    """
    extras = [tensor for tensor in (z, q_scale) if tensor is not None]
    if reason := unsupported_tensors(x, *modulations, *extras, fp8=fp8):
        return reason
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}"
    if x.shape[-1] > MAX_DIM:
        return f"D is {x.shape[-1]}, above {MAX_DIM}"
    if z is not None and (z.shape != x.shape or z.dtype not in FLOATS):
        return f"z {z.dtype} {list(z.shape)} does not belong to x {list(x.shape)}"
    if q_scale is not None and not is_scale(q_scale):
        return f"its scale {q_scale.dtype} {list(q_scale.shape)} is no scalar in fp32"
    if reason := unsupported_modulation(x, *modulations):
        return reason
    for name, tensor in (("x", x), ("z", z)):
        if tensor is not None and not tensor.is_contiguous():
            return f"{name} {list(tensor.shape)} is not contiguous"
    return None


def unsupported_modulation(x: Tensor, *modulations: Tensor) -> str | None:
    """Problem of a tensor that is not fp32 ``[B, 1, D]`` or ``[1, 1, D]``, for x ``[B, L, D]``."""
    batch, _, dim = x.shape
    for tensor in modulations:
        description = f"a modulation {tensor.dtype} {list(tensor.shape)}"
        shapes = ((1, 1, dim), (batch, 1, dim))
        if tensor.shape not in shapes or tensor.dtype != torch.float32:
            return f"{description} does not belong to x {list(x.shape)}"
    return None


@jit
def _adaln_kernel(  # type: ignore[no-untyped-def]
    x, z, gate, updated, scale, shift, q_scale, out, out_scale,
    length, gate_stride, scale_stride, shift_stride, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
    RESIDUAL: tl.constexpr, STATIC: tl.constexpr, DYNAMIC: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < D
    factor = 1.0 + tl.load(scale + batch * scale_stride + column, mask=inside, other=0.0)
    bias = tl.load(shift + batch * shift_stride + column, mask=inside, other=0.0)
    if RESIDUAL:
        weight = tl.load(gate + batch * gate_stride + column, mask=inside, other=0.0)
    if STATIC:
        step = tl.load(q_scale)
    first = tl.program_id(0) * TOKENS
    for token in range(first, min(first + TOKENS, length)):
        row = batch.to(tl.int64) * length + token
        offsets = row * D + column
        value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        if RESIDUAL:
            value += tl.load(z + offsets, mask=inside, other=0.0).to(tl.float32) * weight
            tl.store(updated + offsets, value.to(updated.dtype.element_ty), mask=inside)
        mean = tl.sum(value) / D
        centred = tl.where(inside, value - mean, 0.0)
        deviation = tl.rsqrt(tl.sum(centred * centred) / D + tl.cast(eps, tl.float32))
        y = centred * deviation * factor + bias
        if DYNAMIC:
            largest = tl.max(tl.where(inside, tl.abs(y), 0.0))
            step = row_scale_of(largest)
            tl.store(out_scale + row, step)
        if STATIC or DYNAMIC:
            # A quotient, as 1 / step is infinite for the smallest steps.
            tl.store(out + offsets, round_to_8bit(y / step, out.dtype.element_ty), mask=inside)
        else:
            tl.store(out + offsets, y.to(out.dtype.element_ty), mask=inside)


def launch_adaln(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    *,
    dtype: torch.dtype,
    z: Tensor | None = None,
    gate: Tensor | None = None,
    q_scale: Tensor | None = None,
    by_row: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernel.

    Args:
        x: ``[B, L, D]``.
        scale: ``[B, 1, D]`` or ``[1, 1, D]`` in fp32.
        shift: the same.
        eps: added to the variance.
        dtype: of y.
        z: what is added to ``x`` first, times ``gate``.
        gate: like ``scale``.
        q_scale: the static scale of a y in 8 bits.
        by_row: a y in 8 bits has a scale for each token instead.

    Returns:
        The updated stream (``x`` itself without ``z``), y, and the scales of tokens ``[B, L, 1]``
        in fp32 (empty unless ``by_row``).
    """
    batch, length, dim = x.shape
    updated = x if z is None else torch.empty_like(x)
    y = torch.empty_like(x, dtype=dtype)
    scales = x.new_empty((batch, length, 1) if by_row else (0,), dtype=torch.float32)
    meta = config("adaln" if z is None else "residual_adaln", sm_of(x), dim=dim, length=length)
    # What a variant does not read is not looked at: any tensor will do in its place.
    launch(
        _adaln_kernel, (-(-length // meta["TOKENS"]), batch),
        x, x if z is None else z, scale if gate is None else gate, updated, scale, shift,
        scale if q_scale is None else q_scale, y, scales if by_row else scale,
        length, *(_batch_stride(t) for t in (scale if gate is None else gate, scale, shift)), eps,
        D=dim, BLOCK=next_power_of_two(dim),
        RESIDUAL=z is not None, STATIC=q_scale is not None, DYNAMIC=by_row, **meta,
    )  # fmt: skip
    return updated, y, scales


def _batch_stride(modulation: Tensor) -> int:
    return 0 if modulation.shape[0] == 1 else modulation.stride(0)


@script(DOMAIN, default_opset=op)
def AdaLN(x, scale, shift, eps: float):  # type: ignore[no-untyped-def]
    x32 = op.Cast(x, to=1)
    one = op.Constant(value_float=1.0)
    ones = op.Expand(one, op.Shape(x, start=-1))
    normed = op.LayerNormalization(x32, ones, axis=-1, epsilon=eps)
    return op.CastLike(normed * (scale + one) + shift, x)


@triton_op("wanx::adaln", mutates_args=())
def _adaln(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    if runs_reference("adaln", unsupported_reason(x, scale, shift), x):
        return adaln_reference(x, scale, shift, eps)
    return launch_adaln(x, scale, shift, eps, dtype=x.dtype)[1]


@_adaln.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@triton_op("wanx::adaln_to", mutates_args=())
def _adaln_to(x: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    if runs_reference("adaln_to", unsupported_reason(x, scale, shift), x):
        return adaln_reference(x.float(), scale, shift, eps).to(dtype)
    return launch_adaln(x, scale, shift, eps, dtype=dtype)[1]


@_adaln_to.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


def _to_node(x: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return NODES[torch.ops.wanx.adaln.default](x.float(), scale, shift, eps).to(dtype)


register(torch.ops.wanx.adaln.default, AdaLN)
register_node(torch.ops.wanx.adaln_to.default, _to_node)


def adaln(
    x: Tensor, scale: Tensor, shift: Tensor, *, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """Normalise and modulate ``x``; see the module's contract for shapes."""
    if needs_gradient(x, scale, shift):
        return adaln_reference(x.float(), scale, shift, eps).to(dtype or x.dtype)
    if dtype in (None, x.dtype):
        return _adaln(x, scale, shift, eps)
    return _adaln_to(x, scale, shift, eps, dtype)
