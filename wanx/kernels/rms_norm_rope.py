"""Full-row RMS normalisation and rotary embedding of queries and keys.

    n = x / √(mean(x²) + eps) · weight                       over the whole row, all heads at once
    y₂ᵢ   = n₂ᵢ · cosᵢ - n₂ᵢ₊₁ · sinᵢ
    y₂ᵢ₊₁ = n₂ᵢ · sinᵢ + n₂ᵢ₊₁ · cosᵢ                        per head, over interleaved pairs

q and k ``[B, L, H·d]``; weights ``[H·d]``; cos and sin ``[L, d/2]`` in fp32, shared by all heads.
Everything runs in fp32; the results have the dtype of their inputs.

The kernel reads q and k once, a token in each program; rows may lie apart, as in a packed q‖k‖v.
"""

from __future__ import annotations

import torch
from onnxscript import opset23 as op
from onnxscript import script
from torch import Tensor
from torch.library import triton_op

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
from wanx.kernels.quantize import is_scale, round_to_8bit
from wanx.kernels.registry import DOMAIN, needs_gradient, register
from wanx.kernels.rms_norm import rms_norm_reference


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    even, odd = x.unflatten(-1, (num_heads, -1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    pairs = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return pairs.flatten(-3)


def rms_norm_rope_reference(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Normalise and rotate in fp32 and return in the dtypes of ``q`` and ``k``."""
    q32, k32 = (
        _rotate(rms_norm_reference(x.float(), weight, eps), cos, sin, num_heads)
        for x, weight in ((q, q_weight), (k, k_weight))
    )
    return q32.to(q.dtype), k32.to(k.dtype)


def unsupported_reason(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *scales: Tensor,
    num_heads: int,
) -> str | None:
    """Reason why the kernel cannot run, or None; with ``scales`` its results are e4m3."""
    others = (q_weight, k_weight, cos, sin, *scales)
    if reason := unsupported_tensors(q, k, *others, fp8=bool(scales)):
        return reason
    if q.dtype not in FLOATS or k.dtype != q.dtype:
        return f"q is {q.dtype} and k {k.dtype}"
    if k.shape != q.shape:
        return f"q is {list(q.shape)} and k {list(k.shape)}"
    _, length, dim = q.shape
    head = dim // num_heads
    if head * num_heads != dim or head < 16 or head & (head - 1):
        return f"{dim} channels are not {num_heads} heads of a power of two from 16 on"
    row, table, fp32 = (dim,), (length, head // 2), (torch.float32,)
    for name, tensor, shape, dtypes in (
        ("q_weight", q_weight, row, FLOATS),
        ("k_weight", k_weight, row, FLOATS),
        ("cos", cos, table, fp32),
        ("sin", sin, table, fp32),
    ):
        if tensor.shape != shape or tensor.dtype not in dtypes:
            description = f"{name} {tensor.dtype} {list(tensor.shape)}"
            return f"{description} does not belong to q {list(q.shape)} of {num_heads} heads"
        if not tensor.is_contiguous():
            return f"{name} {list(tensor.shape)} is not contiguous"
    for scale in scales:
        if not is_scale(scale):
            return f"a scale {scale.dtype} {list(scale.shape)} is no scalar in fp32"
    return None


@jit
def _rotate_token(  # type: ignore[no-untyped-def]
    x, weight, cosine, sine, scale, out, x_offset, out_offset, eps,
    HEADS: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    head = tl.arange(0, BLOCK)[:, None]
    column = head * HEAD + tl.arange(0, HEAD)[None, :]
    inside = column < HEADS * HEAD
    value = tl.load(x + x_offset + column, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    mean_square = tl.sum(tl.sum(value * value, 1), 0) / (HEADS * HEAD)
    normed = value * tl.rsqrt(mean_square + tl.cast(eps, tl.float32)) * factor
    even, odd = tl.split(tl.reshape(normed, [BLOCK, HEAD // 2, 2]))
    y = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
    y = tl.reshape(y, [BLOCK, HEAD])
    if STATIC:
        # A quotient, as 1 / scale is infinite for the smallest scales.
        y = round_to_8bit(y / tl.load(scale), out.dtype.element_ty)
    tl.store(out + out_offset + column, y.to(out.dtype.element_ty), mask=inside)


@jit
def _rms_norm_rope_kernel(  # type: ignore[no-untyped-def]
    q, k, q_weight, k_weight, cos, sin, q_scale, k_scale, q_out, k_out,
    length, q_batch_stride, q_stride, k_batch_stride, k_stride, eps,
    HEADS: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    pair = token * (HEAD // 2) + tl.arange(0, HEAD // 2)[None, :]
    cosine = tl.load(cos + pair)
    sine = tl.load(sin + pair)
    out_offset = (batch * length + token) * HEADS * HEAD
    q_offset = batch * q_batch_stride + token.to(tl.int64) * q_stride
    k_offset = batch * k_batch_stride + token.to(tl.int64) * k_stride
    if tl.program_id(2) == 0:
        _rotate_token(
            q, q_weight, cosine, sine, q_scale, q_out, q_offset, out_offset, eps,
            HEADS, HEAD, BLOCK, STATIC,
        )  # fmt: skip
    else:
        _rotate_token(
            k, k_weight, cosine, sine, k_scale, k_out, k_offset, out_offset, eps,
            HEADS, HEAD, BLOCK, STATIC,
        )  # fmt: skip


def launch_rms_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    eps: float,
    scales: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the kernel; with ``scales`` of q and k its results are e4m3."""
    batch, length, dim = q.shape
    dtype = q.dtype if scales is None else torch.float8_e4m3fn
    q_out, k_out = (q.new_empty(q.shape, dtype=dtype) for _ in range(2))
    # Without scales they are not looked at: any tensor will do in their place.
    q_scale, k_scale = (cos, cos) if scales is None else scales
    meta = config("rms_norm_rope", sm_of(q), dim=dim, length=length)
    launch(
        _rms_norm_rope_kernel, (length, batch, 2),
        q, k, q_weight, k_weight, cos, sin, q_scale, k_scale, q_out, k_out,
        length, q.stride(0), q.stride(1), k.stride(0), k.stride(1), eps,
        HEADS=num_heads, HEAD=dim // num_heads, BLOCK=next_power_of_two(num_heads),
        STATIC=scales is not None, **meta,
    )  # fmt: skip
    return q_out, k_out


@script(DOMAIN, default_opset=op)
def RMSNormRope(q, k, q_weight, k_weight, cos, sin, num_heads: int, eps: float):  # type: ignore[no-untyped-def]
    batch_axis = op.Constant(value_ints=[0])
    cache = op.Concat(op.Shape(q, start=0, end=1), op.Shape(cos), axis=0)
    batch_cos = op.Expand(op.Unsqueeze(cos, batch_axis), cache)
    batch_sin = op.Expand(op.Unsqueeze(sin, batch_axis), cache)
    q_norm = op.RMSNormalization(op.Cast(q, to=1), op.Cast(q_weight, to=1), axis=-1, epsilon=eps)
    k_norm = op.RMSNormalization(op.Cast(k, to=1), op.Cast(k_weight, to=1), axis=-1, epsilon=eps)
    q_rope = op.RotaryEmbedding(q_norm, batch_cos, batch_sin, interleaved=1, num_heads=num_heads)
    k_rope = op.RotaryEmbedding(k_norm, batch_cos, batch_sin, interleaved=1, num_heads=num_heads)
    return op.CastLike(q_rope, q), op.CastLike(k_rope, k)


@triton_op("wanx::rms_norm_rope", mutates_args=())
def _rms_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    reason = unsupported_reason(q, k, q_weight, k_weight, cos, sin, num_heads=num_heads)
    if runs_reference("rms_norm_rope", reason, q):
        return rms_norm_rope_reference(q, k, q_weight, k_weight, cos, sin, num_heads, eps)
    return launch_rms_norm_rope(q, k, q_weight, k_weight, cos, sin, num_heads, eps)


@_rms_norm_rope.register_fake
def _(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


register(torch.ops.wanx.rms_norm_rope.default, RMSNormRope)


def rms_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Normalise and rotate queries and keys; see the module's contract for shapes."""
    if needs_gradient(q, k, q_weight, k_weight, cos, sin):
        return rms_norm_rope_reference(q, k, q_weight, k_weight, cos, sin, num_heads, eps)
    return _rms_norm_rope(q, k, q_weight, k_weight, cos, sin, num_heads, eps)
