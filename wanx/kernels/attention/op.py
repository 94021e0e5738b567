"""Multi-head attention on packed heads.

    o = softmax(scale · q kᵀ + bias) v        per head

q and o ``[B, Lq, H·d]``, k and v ``[B, Lk, H·d]``, all of one floating dtype; ``bias`` (optional)
broadcasts to ``[B, H, Lq, Lk]``. ``scale`` is 1/√d unless given. Softmax runs in fp32.

On a GPU the fastest backend of :mod:`wanx.kernels.attention.backends` runs, without a bias.
"""

from __future__ import annotations

import torch
from onnxscript import opset23 as op
from onnxscript import script
from torch import Tensor
from torch.library import triton_op
from torch.nn import functional as F

from wanx.kernels.attention.backends import AttentionBackend, choose_backend
from wanx.kernels.launch import runs_reference
from wanx.kernels.registry import DOMAIN, needs_gradient, register


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, num_heads: int, scale: float
) -> Tensor:
    """Compute attention in fp32 and return it in the dtype of ``q``."""
    heads = [t.float().unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v)]
    mask = None if bias is None else bias.float()
    out = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).flatten(-2).to(q.dtype)


@script(DOMAIN, default_opset=op)
def Attention(q, k, v, num_heads: int, scale: float):  # type: ignore[no-untyped-def]
    return op.Attention(q, k, v, q_num_heads=num_heads, kv_num_heads=num_heads, scale=scale)


@script(DOMAIN, default_opset=op)
def BiasedAttention(q, k, v, bias, num_heads: int, scale: float):  # type: ignore[no-untyped-def]
    return op.Attention(q, k, v, bias, q_num_heads=num_heads, kv_num_heads=num_heads, scale=scale)


@triton_op("wanx::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
    backend = choose_backend(q, k, v, num_heads, bits=16)
    if isinstance(backend, AttentionBackend):
        return backend.run(q, k, v, num_heads, scale)
    runs_reference("attention", backend, q)
    return attention_reference(q, k, v, None, num_heads, scale)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
    return torch.empty_like(q)


@triton_op("wanx::biased_attention", mutates_args=())
def _biased_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, num_heads: int, scale: float
) -> Tensor:
    return attention_reference(q, k, v, bias, num_heads, scale)


@_biased_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, num_heads: int, scale: float) -> Tensor:
    return torch.empty_like(q)


register(torch.ops.wanx.attention.default, Attention)
register(torch.ops.wanx.biased_attention.default, BiasedAttention)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_heads: int,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attend from q to k and v; see the module's contract for shapes."""
    if scale is None:
        scale = float((q.shape[-1] // num_heads) ** -0.5)
    if needs_gradient(q, k, v, bias):
        return attention_reference(q, k, v, bias, num_heads, scale)
    if bias is None:
        return _attention(q, k, v, num_heads, scale)
    return _biased_attention(q, k, v, bias, num_heads, scale)
