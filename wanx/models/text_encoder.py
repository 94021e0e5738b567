"""The umT5 encoder: T5 with a relative position bias of its own in every layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wanx.config.models import TextEncoderConfig
from wanx.kernels.attention.op import attention
from wanx.kernels.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned scale."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` ``[..., D]``."""
        return rms_norm(x, self.weight, eps=self.eps)


def distance_buckets(num_buckets: int, max_distance: int) -> Tensor:
    """Tabulate the bucket of each distance 0…max_distance, before the sign is added.

    The first half of the buckets holds exact distances, the rest grows logarithmically up to
    ``max_distance`` (T5, Raffel et al. 2020, §2.1). A table is exact where a logarithm in the
    graph could fall on either side of a bucket's edge.
    """
    exact = num_buckets // 2
    buckets = list(range(exact))
    for distance in range(exact, max_distance + 1):
        ratio = math.log(distance / exact) / math.log(max_distance / exact)
        # The tiny offset undoes the rounding of ratios that are whole numbers of buckets.
        bucket = exact + int(ratio * (num_buckets - exact) + 1e-9)
        buckets.append(min(bucket, num_buckets - 1))
    return torch.tensor(buckets, device="cpu")


class RelativePositionBias(nn.Module):
    """A learned bias per head and signed distance bucket."""

    buckets: Tensor

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.num_buckets, config.num_heads)
        self.one_way = config.num_buckets // 2
        self.max_distance = config.max_distance
        table = distance_buckets(self.one_way, config.max_distance)
        self.register_buffer("buckets", table, persistent=False)

    def forward(self, length: int, device: torch.device) -> Tensor:
        """Return the bias ``[1, H, n, n]`` of a sequence of ``length`` tokens."""
        position = torch.arange(length, device=device)
        distance = position[None, :] - position[:, None]
        bucket = self.buckets[distance.abs().clamp_max(self.max_distance)]
        bucket = bucket + (distance > 0) * self.one_way
        return self.embedding(bucket).permute(2, 0, 1).unsqueeze(0)


class SelfAttention(nn.Module):
    """Attention without the usual 1/√d, as in every T5."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        inner = config.num_heads * config.head_dim
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.dim, inner, bias=False)
        self.k = nn.Linear(config.dim, inner, bias=False)
        self.v = nn.Linear(config.dim, inner, bias=False)
        self.o = nn.Linear(inner, config.dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Transform ``x`` ``[B, n, D]`` under an additive ``bias`` ``[B or 1, H, n, n]``."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        out: Tensor = self.o(attention(q, k, v, bias=bias, num_heads=self.num_heads, scale=1.0))
        return out


class FeedForward(nn.Module):
    """Gated tanh-GELU."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.gate = nn.ModuleList([nn.Linear(config.dim, config.ffn_dim, bias=False)])
        self.fc1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.fc2 = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x`` ``[B, n, D]``."""
        out: Tensor = self.fc2(self.fc1(x) * F.gelu(self.gate[0](x), approximate="tanh"))
        return out


class TextBlock(nn.Module):
    """One encoder layer."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.dim, config.eps)
        self.attn = SelfAttention(config)
        self.norm2 = RMSNorm(config.dim, config.eps)
        self.ffn = FeedForward(config)
        self.pos_embedding = RelativePositionBias(config)

    def forward(self, x: Tensor, mask_bias: Tensor | None) -> Tensor:
        """Transform ``x`` ``[B, n, D]``."""
        bias = self.pos_embedding(x.shape[1], x.device)
        if mask_bias is not None:
            bias = bias + mask_bias
        x = x + self.attn(self.norm1(x), bias)
        return x + self.ffn(self.norm2(x))


class UMT5Encoder(nn.Module):
    """Token ids to text features."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(TextBlock(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.eps)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode ``ids`` ``[B, n]`` to ``[B, n, D]``.

        ``mask`` ``[B, n]`` is 1 for tokens and 0 for padding. The runtime feeds unpadded prompts,
        which gives the same features as padding and masking, so the exported graph has no mask.
        """
        x = self.token_embedding(ids).to(self.norm.weight.dtype)
        mask_bias = None
        if mask is not None:
            lowest = torch.finfo(x.dtype).min
            mask_bias = (1 - mask[:, None, None, :].to(x.dtype)) * lowest
        for block in self.blocks:
            x = block(x, mask_bias)
        out: Tensor = self.norm(x)
        return out
