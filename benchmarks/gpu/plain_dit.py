"""The transformer of Wan2.1 as one writes it in PyTorch, to be compared with.

It does what the public reference implementation does, with PyTorch's own operators: linears and
attention in the dtype of the weights, residual stream, modulation, time embedding and head in fp32,
RMS norms and rotary embedding computed in fp32. It shares no code with :mod:`wanx.models` or
:mod:`wanx.kernels`: on a GPU without diffusers it is the only independent reference of a step.
Parameters have the names of the checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wanx.config.models import DiTConfig

Rope = tuple[Tensor, Tensor]
BlockCall = Callable[[Tensor, Tensor, Rope, Tensor], Tensor]


def in_fp32(linear: nn.Module, x: Tensor) -> Tensor:
    """Apply a linear layer in fp32, whatever its weights are stored in."""
    assert isinstance(linear, nn.Linear)
    return F.linear(x.float(), linear.weight.float(), linear.bias.float())


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn interleaved pairs of ``[B, L, H, d]`` by tables ``[L, d/2]``."""
    cos, sin = (table[:, None] for table in rope)
    even, odd = x.float().view(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return turned.flatten(-2).to(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over all heads at once."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[..., D]``."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


class AttentionOp(nn.Module):
    """Attention; a module, so that what it is given can be input_amax."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from ``[B, L, H, d]`` to ``[B, n, H, d]``."""
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Attention of a sequence to itself or to the text."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, config.eps), RMSNorm(dim, config.eps)
        self.attend = AttentionOp()

    def forward(self, x: Tensor, context: Tensor, rope: Rope | None) -> Tensor:
        """Transform ``x`` ``[B, L, D]`` by ``context`` ``[B, n, D]``."""
        q = self._split(self.norm_q(self.q(x)))
        k = self._split(self.norm_k(self.k(context)))
        v = self._split(self.v(context))
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        out: Tensor = self.o(self.attend(q, k, v))
        return out

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1)


class Block(nn.Module):
    """Self-attention, attention to the text, and a feed-forward network."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.dim
        self.eps = config.eps
        self.self_attn, self.cross_attn = Attention(config), Attention(config)
        self.norm3 = nn.LayerNorm(dim, eps=config.eps)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))

    def forward(self, x: Tensor, modulation: Tensor, rope: Rope, text: Tensor) -> Tensor:
        """Transform ``x`` ``[B, L, D]``, in fp32 like ``modulation`` ``[B, 6, D]``."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (
            self.modulation.float() + modulation
        ).chunk(6, 1)
        y = self._norm(x, scale, shift).to(text.dtype)
        x = x + self.self_attn(y, y, rope) * gate
        weight, bias = self.norm3.weight.float(), self.norm3.bias.float()
        y = F.layer_norm(x, x.shape[-1:], weight, bias, self.eps).to(text.dtype)
        x = x + self.cross_attn(y, text, None)
        y = self._norm(x, ffn_scale, ffn_shift).to(text.dtype)
        out: Tensor = x + self.ffn(y) * ffn_gate
        return out

    def _norm(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale) + shift


class Head(nn.Module):
    """From the stream to the velocity."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.head = nn.Linear(config.dim, config.velocity_dim)
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Project ``[B, L, D]``."""
        shift, scale = (self.modulation.float() + time[:, None]).chunk(2, 1)
        return in_fp32(self.head, F.layer_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale) + shift)


class PlainDiT(nn.Module):
    """The whole of it."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.dim
        self.freq_dim = config.freq_dim
        self.patch_embedding = nn.Linear(config.token_dim, dim)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)

    def forward(
        self, values: Mapping[str, Tensor], blocks: Sequence[BlockCall] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Predict the velocity.

        Args:
            values: ``tokens``, ``timestep``, ``context``, ``rope_cos`` and ``rope_sin``, as
                :class:`wanx.models.dit.model.WanDiT` takes them.
            blocks: what runs instead of the blocks.

        Returns:
            The velocity ``[B, L, velocity_dim]`` and the residual stream before the head, in fp32.
        """
        dtype = self.patch_embedding.weight.dtype
        time = self._time(values["timestep"])
        modulation = in_fp32(self.time_projection[1], F.silu(time)).view(len(time), 6, -1)
        text = self.text_embedding(values["context"].to(dtype))
        x = self.patch_embedding(values["tokens"].to(dtype)).float()
        rope = values["rope_cos"], values["rope_sin"]
        for block in self.blocks if blocks is None else blocks:
            x = block(x, modulation, rope, text)
        return self.head(x, time), x

    def _time(self, timestep: Tensor) -> Tensor:
        half = self.freq_dim // 2
        steps = torch.arange(half, dtype=torch.float64, device=timestep.device)
        angles = timestep.double()[:, None] * torch.exp(-math.log(10000.0) * steps / half)
        sinusoids = torch.cat([angles.cos(), angles.sin()], -1)
        return in_fp32(self.time_embedding[2], F.silu(in_fp32(self.time_embedding[0], sinusoids)))
