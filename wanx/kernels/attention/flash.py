"""Multi-head attention on packed heads in Triton, in 16 bits.

    o = softmax(scale · q kᵀ) v        per head

q and o ``[B, Lq, H·d]``, k and v ``[B, Lk, H·d]``, all bf16 or fp16; d a power of two from 16 to
256. Rows may lie apart, as in a packed q‖k‖v. Products accumulate in fp32, softmax runs in fp32 by
powers of two, and its weights are rounded to the dtype of v before they multiply it.

A program takes a block of queries of one head past all keys, keeping the running maximum and sum
of each row (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135).
Whatever remains of the keys beyond whole blocks is masked in one last step: nothing is padded.
From Hopper on, TMA may move the blocks, and warps may specialise, if the tuning table says so.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

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

HALVES = (torch.bfloat16, torch.float16)


def unsupported_reason(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> str | None:
    """Reason why the kernel cannot run, or None."""
    if reason := unsupported_tensors(q, k, v):
        return reason
    if not q.dtype == k.dtype == v.dtype or q.dtype not in HALVES:
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}"
    return unsupported_shapes(q, k, v, num_heads)


def unsupported_shapes(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> str | None:
    """Problem with the shapes of q, k and v, or None."""
    if k.shape != v.shape or q.shape[::2] != k.shape[::2] or q.shape[-1] % num_heads:
        shapes = [list(tensor.shape) for tensor in (q, k, v)]
        return f"q, k and v are {shapes[0]}, {shapes[1]} and {shapes[2]}, with {num_heads} heads"
    head = q.shape[-1] // num_heads
    if not 16 <= head <= 256 or head & (head - 1):
        return f"heads of {head} are no power of two between 16 and 256"
    return None


@jit
def _load(  # type: ignore[no-untyped-def]
    key_place, value_place, key_stride, value_stride, left,
    HEAD: tl.constexpr, BLOCK_K: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """One block of keys, turned, and of values; ``left`` of them exist."""
    row = tl.arange(0, BLOCK_K)
    column = tl.arange(0, HEAD)
    key_place += row[None, :] * key_stride + column[:, None]
    value_place += row[:, None] * value_stride + column[None, :]
    if MASK:
        keys = tl.load(key_place, mask=row[None, :] < left, other=0.0)
        values = tl.load(value_place, mask=row[:, None] < left, other=0.0)
    else:
        keys = tl.load(key_place)
        values = tl.load(value_place)
    return keys, values


@jit
def _attend(  # type: ignore[no-untyped-def]
    queries, keys, values, left, scale, highest, total, mixed, MASK: tl.constexpr,
):  # fmt: skip
    """Let queries ``[BLOCK_Q, HEAD]`` attend to keys ``[HEAD, BLOCK_K]``; ``left`` exist."""
    score = tl.dot(queries, keys) * tl.cast(scale, tl.float32)
    if MASK:
        score = tl.where(tl.arange(0, keys.shape[1])[None, :] < left, score, float("-inf"))
    highest_now = tl.maximum(highest, tl.max(score, 1))
    weight = tl.exp2(score - highest_now[:, None])
    kept = tl.exp2(highest - highest_now)
    total = total * kept + tl.sum(weight, 1)
    mixed = tl.dot(weight.to(values.dtype), values, mixed * kept[:, None])
    return highest_now, total, mixed


@jit
def _attention_kernel(  # type: ignore[no-untyped-def]
    q, k, v, out, scale, q_length, k_length,
    q_batch_stride, q_stride, k_batch_stride, k_stride, v_batch_stride, v_stride,
    out_batch_stride, out_stride,
    HEAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TMA: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK_Q
    head = tl.program_id(1) * HEAD
    batch = tl.program_id(2).to(tl.int64)
    row = tl.arange(0, BLOCK_Q)
    column = tl.arange(0, HEAD)
    inside = first + row[:, None] < q_length
    q_place = q + batch * q_batch_stride + head
    k_place = k + batch * k_batch_stride + head
    v_place = v + batch * v_batch_stride + head
    highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    mixed = tl.zeros([BLOCK_Q, HEAD], tl.float32)
    whole = k_length // BLOCK_K
    if TMA:
        # Each describes the rows of one head: where they end, TMA reads zeros and writes nothing.
        q_rows = tl.make_tensor_descriptor(
            q_place, [q_length, HEAD], [q_stride, 1], [BLOCK_Q, HEAD]
        )
        k_rows = tl.make_tensor_descriptor(
            k_place, [k_length, HEAD], [k_stride, 1], [BLOCK_K, HEAD]
        )
        v_rows = tl.make_tensor_descriptor(
            v_place, [k_length, HEAD], [v_stride, 1], [BLOCK_K, HEAD]
        )
        queries = q_rows.load([tl.program_id(0) * BLOCK_Q, 0])
        # Specialised warps have one loop, the kernel's only one, so each of its steps masks.
        unmasked = 0 if WARP_SPECIALIZE else whole * BLOCK_K
        for key in range(0, unmasked, BLOCK_K):
            highest, total, mixed = _attend(
                queries, tl.trans(k_rows.load([key, 0])), v_rows.load([key, 0]), BLOCK_K, scale,
                highest, total, mixed, False,
            )  # fmt: skip
        for key in tl.range(unmasked, k_length, BLOCK_K, warp_specialize=WARP_SPECIALIZE):
            highest, total, mixed = _attend(
                queries, tl.trans(k_rows.load([key, 0])), v_rows.load([key, 0]), k_length - key,
                scale, highest, total, mixed, True,
            )  # fmt: skip
        out_place = out + batch * out_batch_stride + head
        out_rows = tl.make_tensor_descriptor(
            out_place, [q_length, HEAD], [out_stride, 1], [BLOCK_Q, HEAD]
        )
        y = (mixed / total[:, None]).to(out.dtype.element_ty)
        out_rows.store([tl.program_id(0) * BLOCK_Q, 0], y)
    else:
        q_place += first * q_stride
        queries = tl.load(
            q_place + row[:, None] * q_stride + column[None, :], mask=inside, other=0.0
        )
        for _ in range(whole):
            keys, values = _load(
                k_place, v_place, k_stride, v_stride, BLOCK_K, HEAD, BLOCK_K, False
            )
            highest, total, mixed = _attend(
                queries, keys, values, BLOCK_K, scale, highest, total, mixed, False
            )
            k_place += BLOCK_K * k_stride
            v_place += BLOCK_K * v_stride
        left = k_length - whole * BLOCK_K
        if left > 0:
            keys, values = _load(k_place, v_place, k_stride, v_stride, left, HEAD, BLOCK_K, True)
            highest, total, mixed = _attend(
                queries, keys, values, left, scale, highest, total, mixed, True
            )
        y = (mixed / total[:, None]).to(out.dtype.element_ty)
        out_place = out + batch * out_batch_stride + first * out_stride + head
        tl.store(out_place + row[:, None] * out_stride + column[None, :], y, mask=inside)


def launch_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
    """Run the kernel."""
    batch, length, dim = q.shape
    head = dim // num_heads
    out = q.new_empty(q.shape)
    meta = config("attention", sm_of(q), head=head, keys=k.shape[1], heads=num_heads)
    if meta["TMA"] and unsupported_tma(q, k, v, out):
        meta = without_tma(meta)
    launch(
        _attention_kernel, (-(-length // meta["BLOCK_Q"]), num_heads, batch),
        q, k, v, out, scale * math.log2(math.e), length, k.shape[1],
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        out.stride(0), out.stride(1),
        HEAD=head, **meta,
    )  # fmt: skip
    return out
