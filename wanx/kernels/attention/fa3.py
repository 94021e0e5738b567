"""Multi-head attention on packed heads by FlashAttention-3, in bf16 on Hopper.

    o = softmax(scale · q kᵀ) v        per head

q and o ``[B, Lq, H·d]``, k and v ``[B, Lk, H·d]``; d a multiple of 8 up to 256. Rows may lie apart,
as in a packed q‖k‖v, by multiples of 8 numbers, as the kernel's loads need. Shah et al. 2024,
arXiv:2407.08608.

The kernels are those of the wheel ``fa3-fwd`` (module ``fa3_fwd_interface``), which is built
without fp16. This file was written from that wheel's interface: what runs on a GPU is exercised by
tests marked ``gpu`` alone, the rest with a module in its place.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from wanx.kernels.launch import sm_of, unsupported_tensors


@cache
def _interface() -> Any:
    """The wheel's module, or why there is none."""
    try:
        import fa3_fwd_interface
    except (ImportError, OSError) as error:
        return str(error)
    return fa3_fwd_interface


def unsupported_reason(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> str | None:
    """Reason why FlashAttention-3 cannot run, or None."""
    if reason := unsupported_tensors(q, k, v, triton=False):
        return reason
    if (sm := sm_of(q)) != 90:
        return f"FlashAttention-3 needs SM90, this GPU is SM{sm}"
    if not q.dtype == k.dtype == v.dtype == torch.bfloat16:
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, not bfloat16"
    head = q.shape[-1] // num_heads
    if head > 256 or head % 8:
        return f"heads of {head} are no multiple of 8 up to 256"
    for tensor in (q, k, v):
        if tensor.stride(0) % 8 or tensor.stride(1) % 8:
            return f"rows of {list(tensor.shape)} are no multiples of 8 apart"
    if isinstance(_interface(), str):
        return f"FlashAttention-3 is not installed ({_interface()}): pip install 'wanx[fa3]'"
    return None


@torch.library.custom_op("wanx::attention_fa3", mutates_args=())
def attention_fa3(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
    """Attend, on tensors of which :func:`unsupported_reason` says nothing."""
    q, k, v = (tensor.unflatten(-1, (num_heads, -1)) for tensor in (q, k, v))
    out: Tensor = _interface().flash_attn_func(q, k, v, softmax_scale=scale, causal=False)
    return out.flatten(-2)


@attention_fa3.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
    return q.new_empty(q.shape)
