"""Multi-head attention on packed heads in Triton, with both products in 8 bits.

    o = softmax(scale · q (k - k̄)ᵀ) v        per head, k̄ the mean of k over its rows

Subtracting k̄ from every key moves all scores of a query alike, which softmax does not see, and
takes out the channels in which all keys are large (Zhang et al. 2024, arXiv:2411.10958). q and k
are then rounded to int8 with a scale for each block of rows and head, v to e4m3 with one for each
channel, and the weights of softmax, which lie in 0…1, to e4m3 by 1/448.

q and o ``[B, Lq, H·d]``, k and v ``[B, Lk, H·d]``, all bf16 or fp16; d a power of two from 32 to
128. Rows may lie apart, as in a packed q‖k‖v. Each block's product with v starts from zero and is
added in fp32: the FP8 accumulators of Hopper keep about 22 bits. Remaining keys beyond whole blocks
are masked in one last step, and nothing is padded but v's own 8-bit copy, to 16 bytes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wanx.config.number_formats import FP8, INT8
from wanx.kernels.attention.flash import HALVES, unsupported_shapes
from wanx.kernels.launch import (
    jit,
    launch,
    sm_of,
    tl,
    unsupported_tensors,
    unsupported_tma,
    without_tma,
)
from wanx.kernels.launch_config import config
from wanx.kernels.quantize import round_to_8bit

BLOCK = 128  # rows of the reference that share a scale, as on most GPUs


def attention_8bit_reference(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float
) -> Tensor:
    """Round the operands as the kernel does, attend in fp32, return the dtype of ``q``.

    The kernel rounds a weight of softmax in units of the largest one so far, this one in units of
    the largest of all.
    """
    split = [t.float().unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v)]
    q32, k32, v32 = split
    q8, q_scale = _rounded_blocks(q32)
    k8, k_scale = _rounded_blocks(k32 - k32.mean(2, keepdim=True))
    v_scale = v32.abs().amax(2, keepdim=True).clamp_min(1e-30) / FP8.largest
    v8 = (v32 / v_scale).to(torch.float8_e4m3fn).float()
    score = (q8 @ k8.transpose(-2, -1)) * q_scale * k_scale.transpose(-2, -1) * scale
    weight = torch.exp(score - score.amax(-1, keepdim=True))
    rounded = (weight * FP8.largest).to(torch.float8_e4m3fn).float() / FP8.largest
    out = (rounded @ v8) / weight.sum(-1, keepdim=True) * v_scale
    return out.transpose(1, 2).flatten(-2).to(q.dtype)


def _rounded_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round ``[B, H, L, d]`` to integers; return them in fp32 and the scale of each row."""
    amax = torch.stack([part.abs().amax((2, 3)) for part in x.split(BLOCK, 2)], 2)
    scale = amax.clamp_min(1e-30).repeat_interleave(BLOCK, 2)[:, :, : x.shape[2], None]
    scale = scale / INT8.largest
    return (x / scale).round(), scale


def unsupported_reason(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> str | None:
    """Reason why the kernel cannot run, or None."""
    if reason := unsupported_tensors(q, k, v, fp8=True):
        return reason
    if not q.dtype == k.dtype == v.dtype or q.dtype not in HALVES:
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}"
    if reason := unsupported_shapes(q, k, v, num_heads):
        return reason
    head = q.shape[-1] // num_heads
    # Products of int8 have steps of 32.
    return None if 32 <= head <= 128 else f"heads of {head} are not between 32 and 128"


@jit
def _round_rows_kernel(  # type: ignore[no-untyped-def]
    x, mean, out, scales, length, batch_stride, stride, heads,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, CENTRE: tl.constexpr,
):  # fmt: skip
    """Round one block of rows of one head to int8."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    row = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    column = head * HEAD + tl.arange(0, HEAD)[None, :]
    inside = row < length
    pointers = x + batch * batch_stride + row * stride + column
    value = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    if CENTRE:
        value = tl.where(inside, value - tl.load(mean + batch * heads * HEAD + column), 0.0)
    scale = tl.maximum(tl.max(tl.max(tl.abs(value), 1), 0), 1e-30) / 127.0
    tl.store(scales + (batch * heads + head) * tl.num_programs(0) + block, scale)
    rounded = round_to_8bit(value / scale, tl.int8)
    tl.store(out + (batch * length + row) * (heads * HEAD) + column, rounded, mask=inside)


@jit
def _round_values_kernel(  # type: ignore[no-untyped-def]
    v, scales, out, length, padded, batch_stride, stride, heads,
    HEAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Round one block of values of one head to e4m3, and turn it: FP8 products want keys inside."""
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, HEAD)
    channel = (batch * heads + head) * HEAD + column
    pointers = v + batch * batch_stride + row[:, None] * stride + head * HEAD + column[None, :]
    value = tl.load(pointers, mask=row[:, None] < length, other=0.0).to(tl.float32)
    rounded = round_to_8bit(value / tl.load(scales + channel)[None, :], tl.float8e4nv)
    turned = out + channel[:, None] * padded + row[None, :]
    tl.store(turned, tl.trans(rounded), mask=row[None, :] < padded)


@jit
def _load(  # type: ignore[no-untyped-def]
    k_place, v_place, k_stride, padded, left,
    HEAD: tl.constexpr, BLOCK_K: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """One block of keys and of values, both turned; ``left`` of them exist."""
    row = tl.arange(0, BLOCK_K)
    column = tl.arange(0, HEAD)
    k_place += row[None, :] * k_stride + column[:, None]
    v_place += column[:, None] * padded + row[None, :]
    if MASK:
        keys = tl.load(k_place, mask=row[None, :] < left, other=0)
        values = tl.load(v_place, mask=row[None, :] < left, other=0.0)
    else:
        keys = tl.load(k_place)
        values = tl.load(v_place)
    return keys, values


@jit
def _attend(  # type: ignore[no-untyped-def]
    queries, keys, values, left, scale, highest, total, mixed, MASK: tl.constexpr,
):  # fmt: skip
    """Let queries ``[BLOCK_Q, HEAD]`` attend to one block ``[HEAD, BLOCK_K]``; ``left`` exist."""
    score = tl.dot(queries, keys, out_dtype=tl.int32).to(tl.float32) * scale
    if MASK:
        score = tl.where(tl.arange(0, keys.shape[1])[None, :] < left, score, float("-inf"))
    highest_now = tl.maximum(highest, tl.max(score, 1))
    # log₂ 448 = 8.807: the weights come out in units of 1/448.
    weight = tl.exp2(score - (highest_now - 8.807354922057604)[:, None])
    kept = tl.exp2(highest - highest_now)
    total = total * kept + tl.sum(weight, 1)
    mixed = mixed * kept[:, None] + tl.dot(weight.to(tl.float8e4nv), tl.trans(values))
    return highest_now, total, mixed


@jit
def _attention_8bit_kernel(  # type: ignore[no-untyped-def]
    q8, k8, v8, q_scale, k_scale, v_scale, out, scale, q_length, k_length, padded, heads,
    HEAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TMA: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    stride = heads * HEAD
    row = block.to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)[:, None]
    column = tl.arange(0, HEAD)
    inside = row < q_length
    q_start = batch * q_length * stride + head * HEAD
    q_place = q_start + row * stride + column[None, :]
    scale = tl.cast(scale, tl.float32)
    scale *= tl.load(q_scale + (batch * heads + head) * tl.num_programs(0) + block)
    k_place = k8 + batch * k_length * stride + head * HEAD
    v_place = v8 + (batch * heads + head) * HEAD * padded
    k_scale += (batch * heads + head) * tl.cdiv(k_length, BLOCK_K)
    highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    mixed = tl.zeros([BLOCK_Q, HEAD], tl.float32)
    whole = k_length // BLOCK_K
    if TMA:  # as in _attention_kernel
        q_rows = tl.make_tensor_descriptor(
            q8 + q_start, [q_length, HEAD], [stride, 1], [BLOCK_Q, HEAD]
        )
        k_rows = tl.make_tensor_descriptor(k_place, [k_length, HEAD], [stride, 1], [BLOCK_K, HEAD])
        v_rows = tl.make_tensor_descriptor(v_place, [HEAD, padded], [padded, 1], [HEAD, BLOCK_K])
        queries = q_rows.load([block * BLOCK_Q, 0])
        unmasked = 0 if WARP_SPECIALIZE else whole
        for i in range(unmasked):
            highest, total, mixed = _attend(
                queries, tl.trans(k_rows.load([i * BLOCK_K, 0])), v_rows.load([0, i * BLOCK_K]),
                BLOCK_K, scale * tl.load(k_scale + i), highest, total, mixed, False,
            )  # fmt: skip
        steps = tl.cdiv(k_length, BLOCK_K)
        for i in tl.range(unmasked, steps, warp_specialize=WARP_SPECIALIZE):
            highest, total, mixed = _attend(
                queries, tl.trans(k_rows.load([i * BLOCK_K, 0])), v_rows.load([0, i * BLOCK_K]),
                k_length - i * BLOCK_K, scale * tl.load(k_scale + i), highest, total, mixed, True,
            )  # fmt: skip
    else:
        queries = tl.load(q8 + q_place, mask=inside, other=0)
        for i in range(whole):
            keys, values = _load(k_place, v_place, stride, padded, BLOCK_K, HEAD, BLOCK_K, False)
            highest, total, mixed = _attend(
                queries, keys, values, BLOCK_K, scale * tl.load(k_scale + i),
                highest, total, mixed, False,
            )  # fmt: skip
            k_place += BLOCK_K * stride
            v_place += BLOCK_K
        left = k_length - whole * BLOCK_K
        if left > 0:
            keys, values = _load(k_place, v_place, stride, padded, left, HEAD, BLOCK_K, True)
            highest, total, mixed = _attend(
                queries, keys, values, left, scale * tl.load(k_scale + whole),
                highest, total, mixed, True,
            )  # fmt: skip
    channel = tl.load(v_scale + (batch * heads + head) * HEAD + column)
    y = (mixed / total[:, None] * channel[None, :]).to(out.dtype.element_ty)
    if TMA:
        out_rows = tl.make_tensor_descriptor(
            out + q_start, [q_length, HEAD], [stride, 1], [BLOCK_Q, HEAD]
        )
        out_rows.store([block * BLOCK_Q, 0], y)
    else:
        tl.store(out + q_place, y, mask=inside)


def launch_attention_8bit(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
    """Run the kernels: q and k to int8, v to e4m3, then attention."""
    batch, q_length, dim = q.shape
    k_length, head = k.shape[1], dim // num_heads
    meta = config("attention_8bit", sm_of(q), head=head, keys=k_length, heads=num_heads)
    block_q, block_k = meta["BLOCK_Q"], meta["BLOCK_K"]
    q8, q_scale = _round_rows(q, None, num_heads, block_q)
    k8, k_scale = _round_rows(k, k.mean(1, dtype=torch.float32), num_heads, block_k)
    v_scale = torch.linalg.vector_norm(v, math.inf, dim=1, dtype=torch.float32)
    v_scale = v_scale.clamp_min(1e-30) / FP8.largest
    padded = -(-k_length // 16) * 16
    v8 = v.new_empty((batch, dim, padded), dtype=torch.float8_e4m3fn)
    launch(
        _round_values_kernel, (-(-padded // block_k), num_heads, batch),
        v, v_scale, v8, k_length, padded, v.stride(0), v.stride(1), num_heads,
        HEAD=head, BLOCK=block_k, num_warps=4,
    )  # fmt: skip
    out = q.new_empty(q.shape)
    if meta["TMA"] and unsupported_tma(q8, k8, v8, out):
        meta = without_tma(meta)
    launch(
        _attention_8bit_kernel, (-(-q_length // block_q), num_heads, batch),
        q8, k8, v8, q_scale, k_scale, v_scale, out, scale * math.log2(math.e),
        q_length, k_length, padded, num_heads,
        HEAD=head, **meta,
    )  # fmt: skip
    return out


def _round_rows(
    x: Tensor, mean: Tensor | None, num_heads: int, block: int
) -> tuple[Tensor, Tensor]:
    batch, length, dim = x.shape
    blocks = -(-length // block)
    x8 = x.new_empty(x.shape, dtype=torch.int8)
    scales = x.new_empty((batch, num_heads, blocks), dtype=torch.float32)
    launch(
        _round_rows_kernel, (blocks, num_heads, batch),
        x, scales if mean is None else mean, x8, scales, length, x.stride(0), x.stride(1),
        num_heads, HEAD=dim // num_heads, BLOCK=block, CENTRE=mean is not None, num_warps=8,
    )  # fmt: skip
    return x8, scales
