"""Full-row RMS normalisation and rotary embedding of queries and keys.

    n = x / √(mean(x²) + eps) · weight                       over the whole row, all heads at once
    y₂ᵢ   = n₂ᵢ · cosᵢ - n₂ᵢ₊₁ · sinᵢ
    y₂ᵢ₊₁ = n₂ᵢ · sinᵢ + n₂ᵢ₊₁ · cosᵢ                        per head, over interleaved pairs

q and k ``[B, L, H·d]``; weights ``[H·d]``; cos and sin ``[L, d/2]`` in fp32, shared by all heads.
Everything runs in fp32; the results have the dtype of their inputs.
"""

from __future__ import annotations

import torch
from onnxscript import opset23 as op
from onnxscript import script
from torch import Tensor

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


@torch.library.custom_op("wanx::rms_norm_rope", mutates_args=())
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
    return rms_norm_rope_reference(q, k, q_weight, k_weight, cos, sin, num_heads, eps)


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
    return torch.empty_like(q), torch.empty_like(k)


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
