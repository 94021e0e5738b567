"""A block of the diffusion transformer, and its head.

The residual stream and the modulation run in fp32; linears and attention run in the dtype of their
weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wanx.config.models import DiTConfig
from wanx.kernels.adaln import adaln
from wanx.kernels.attention.op import attention
from wanx.kernels.gated_residual import gated_residual
from wanx.kernels.rms_norm_rope import rms_norm_rope
from wanx.models.dit.embeddings import linear_fp32
from wanx.models.text_encoder import RMSNorm


def split_modulation(x: Tensor) -> list[Tensor]:
    """Cut ``[B, n, D]`` into n tensors ``[B, 1, D]``.

    Slices, because ``chunk`` becomes a sequence in ONNX, which few runtimes optimise.
    """
    return [x.narrow(1, i, 1) for i in range(x.shape[1])]


class AttentionOp(nn.Module):
    """Attention of packed heads; a module, so that an 8-bit one can take its place."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from ``q`` ``[B, L, D]`` to ``k`` and ``v`` ``[B, n, D]``."""
        return attention(q, k, v, num_heads=self.num_heads)


class SelfAttention(nn.Module):
    """Self-attention with full-row RMS normalisation and 3-axis rotary embedding of q and k."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads, self.eps = num_heads, eps
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)
        self.attend = AttentionOp(num_heads)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Transform ``x`` ``[B, L, D]``; ``rope`` is (cos, sin), each ``[L, d/2]``."""
        q, k = rms_norm_rope(
            self.q(x), self.k(x), self.norm_q.weight, self.norm_k.weight, *rope,
            num_heads=self.num_heads, eps=self.eps,
        )  # fmt: skip
        out: Tensor = self.o(self.attend(q, k, self.v(x)))
        return out


class CrossAttention(nn.Module):
    """Attention to the text, plus a decoupled attention to image tokens where the task has them."""

    def __init__(self, dim: int, num_heads: int, eps: float, *, image: bool) -> None:
        super().__init__()
        self.num_heads, self.eps = num_heads, eps
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)
        if image:
            self.k_img = nn.Linear(dim, dim)
            self.v_img = nn.Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim, eps)

    def forward(self, x: Tensor, text: Tensor, image: Tensor | None) -> Tensor:
        """Transform ``x`` ``[B, L, D]`` by ``text`` ``[B, n, D]`` and ``image`` ``[B, m, D]``."""
        q = self.norm_q(self.q(x))
        y = attention(q, self.norm_k(self.k(text)), self.v(text), num_heads=self.num_heads)
        if image is not None:
            k = self.norm_k_img(self.k_img(image))
            y = y + attention(q, k, self.v_img(image), num_heads=self.num_heads)
        out: Tensor = self.o(y)
        return out


class FeedForward(nn.ModuleList):
    """Linear, tanh-GELU, linear; the parameters are at indices 0 and 2."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__([nn.Linear(dim, hidden), nn.GELU("tanh"), nn.Linear(hidden, dim)])

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x`` ``[B, L, D]``."""
        for layer in self:
            x = layer(x)
        return x


class Block(nn.Module):
    """Self-attention, cross attention and feed-forward around one residual stream."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim, heads, eps = config.dim, config.num_heads, config.eps
        self.eps = eps
        self.self_attn = SelfAttention(dim, heads, eps)
        self.norm3 = nn.LayerNorm(dim, eps=eps)
        self.cross_attn = CrossAttention(dim, heads, eps, image=config.image_dim is not None)
        self.ffn = FeedForward(dim, config.ffn_dim)
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        # What the outputs of the two AdaLNs are divided by, where 8-bit layers read them.
        self.attn_smooth: nn.Parameter | None = None
        self.ffn_smooth: nn.Parameter | None = None

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        rope: tuple[Tensor, Tensor],
        text: Tensor,
        image: Tensor | None,
    ) -> Tensor:
        """Transform ``x`` ``[B, L, D]`` under ``modulation`` ``[B, 6, D]``; both are fp32."""
        dtype = text.dtype
        modulation = self.modulation.float() + modulation
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = split_modulation(modulation)
        y = adaln(x, *fold_smoothing(scale, shift, self.attn_smooth), eps=self.eps).to(dtype)
        x = gated_residual(x, self.self_attn(y, rope), gate)
        y = F.layer_norm(
            x, x.shape[-1:], self.norm3.weight.float(), self.norm3.bias.float(), self.eps
        ).to(dtype)
        x = x + self.cross_attn(y, text, image).float()
        y = adaln(x, *fold_smoothing(ffn_scale, ffn_shift, self.ffn_smooth), eps=self.eps).to(dtype)
        return gated_residual(x, self.ffn(y), ffn_gate)


def fold_smoothing(scale: Tensor, shift: Tensor, vector: Tensor | None) -> tuple[Tensor, Tensor]:
    """Divide what an AdaLN will return by ``vector`` ``[D]``, in its modulation, at no cost."""
    if vector is None:
        return scale, shift
    return (1 + scale) / vector - 1, shift / vector


class VaceBlock(Block):
    """A block of the control branch, with the projections that tie it to the main one."""

    def __init__(self, config: DiTConfig, *, first: bool) -> None:
        super().__init__(config)
        self.before_proj = nn.Linear(config.dim, config.dim) if first else None
        self.after_proj = nn.Linear(config.dim, config.dim)


class Head(nn.Module):
    """Modulated norm and projection to the velocity, in fp32."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.head = nn.Linear(config.dim, config.velocity_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Project ``x`` ``[B, L, D]`` under ``time`` ``[B, D]`` to ``[B, L, velocity_dim]``."""
        shift, scale = split_modulation(self.modulation.float() + time.unsqueeze(1))
        return linear_fp32(self.head, adaln(x, scale, shift, eps=self.eps))
