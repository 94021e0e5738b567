"""Embeddings of timesteps and images for the diffusion transformer of Wan2.1."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def linear_fp32(linear: nn.Linear, x: Tensor) -> Tensor:
    """Apply ``linear`` to ``x`` ``[..., D]`` in fp32, whatever the dtype of its weights."""
    return F.linear(x.float(), linear.weight.float(), linear.bias.float())


class TimeEmbedding(nn.ModuleList):
    """Sinusoids of the timestep through Linear, SiLU, Linear; all in fp32."""

    high: Tensor
    low: Tensor

    def __init__(self, freq_dim: int, dim: int) -> None:
        super().__init__([nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim)])
        half = freq_dim // 2
        # Constants name their device, so that they are real where the weights are not.
        steps = torch.arange(half, dtype=torch.float64, device="cpu")
        frequency = torch.pow(10000.0, -steps / half)
        # The angle t·f reaches 1000 rad, where fp32 products lose four digits of the sine. With f
        # cut into a 12-bit head and a tail, t·head is exact for whole t up to 4095.
        head = (frequency * 4096).round() / 4096
        self.register_buffer("high", head.float(), persistent=False)
        self.register_buffer("low", (frequency - head).float(), persistent=False)

    def forward(self, timestep: Tensor) -> Tensor:
        """Embed ``timestep`` ``[B]`` (fp32, 0…1000) to ``[B, D]`` in fp32."""
        t = timestep.float()[:, None]
        a, b = t * self.high, t * self.low
        cos = a.cos() * b.cos() - a.sin() * b.sin()
        sin = a.sin() * b.cos() + a.cos() * b.sin()
        first, _, last = cast(Iterable[nn.Linear], self)
        hidden = linear_fp32(first, torch.cat([cos, sin], dim=-1))
        return linear_fp32(last, F.silu(hidden))


class ImageEmbedding(nn.Module):
    """CLIP features to the width of the model: norm, Linear, GELU, Linear, norm."""

    def __init__(self, image_dim: int, dim: int, positions: int | None) -> None:
        super().__init__()
        self.proj = nn.ModuleList(
            [
                nn.LayerNorm(image_dim),
                nn.Linear(image_dim, image_dim),
                nn.GELU(),
                nn.Linear(image_dim, dim),
                nn.LayerNorm(dim),
            ]
        )
        if positions is not None:
            self.emb_pos = nn.Parameter(torch.zeros(1, positions, image_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Embed ``x`` ``[B, tokens, image_dim]``."""
        if hasattr(self, "emb_pos"):
            x = x + self.emb_pos
        for layer in self.proj:
            x = layer(x)
        return x
