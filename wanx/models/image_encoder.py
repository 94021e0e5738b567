"""The vision tower of CLIP as Wan2.1 uses it: an image to features of its patches.

Wan2.1 reads the tokens that leave the last layer but one, before any norm behind it. So the last
layer, which every checkpoint has, is neither built nor stored.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wanx.config.models import ImageEncoderConfig
from wanx.kernels.attention.op import attention


class SelfAttention(nn.Module):
    """Self-attention whose queries, keys and values come from one projection."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x`` ``[B, n, D]``."""
        dim = x.shape[-1]
        qkv = self.to_qkv(x)
        # Slices, because ``chunk`` becomes a sequence in ONNX, which few runtimes optimise.
        q, k, v = (qkv[..., i * dim : (i + 1) * dim] for i in range(3))
        out: Tensor = self.proj(attention(q, k, v, num_heads=self.num_heads))
        return out


class FeedForward(nn.ModuleList):
    """Linear, exact GELU, linear; the parameters are at indices 0 and 2."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__([nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)])

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x`` ``[B, n, D]``."""
        for layer in self:
            x = layer(x)
        return x


class ImageBlock(nn.Module):
    """Attention and feed-forward, each behind a norm."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=config.eps)
        self.attn = SelfAttention(config.dim, config.num_heads)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.eps)
        self.mlp = FeedForward(config.dim, config.ffn_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x`` ``[B, n, D]``."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class ImageEncoder(nn.Module):
    """Pixels to the features that the transformer attends to."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(
            3, config.dim, config.patch_size, stride=config.patch_size, bias=False
        )
        scale = config.dim**-0.5
        self.cls_embedding = nn.Parameter(torch.randn(1, 1, config.dim) * scale)
        self.pos_embedding = nn.Parameter(torch.randn(1, config.tokens, config.dim) * scale)
        self.pre_norm = nn.LayerNorm(config.dim, eps=config.eps)
        self.transformer = nn.ModuleList(ImageBlock(config) for _ in range(config.used_layers))

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode ``pixels`` ``[B, 3, S, S]``, normalised as CLIP's, to ``[B, tokens, D]``."""
        patches = (
            self.patch_embedding(pixels.to(self.cls_embedding.dtype)).flatten(2).transpose(1, 2)
        )
        first = self.cls_embedding.expand(pixels.shape[0], -1, -1)
        x = self.pre_norm(torch.cat([first, patches], dim=1) + self.pos_embedding)
        for block in self.transformer:
            x = block(x)
        out: Tensor = x
        return out
