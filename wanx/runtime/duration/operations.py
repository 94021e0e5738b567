"""Multiply-adds of the networks, from their sizes alone.

Counted are linears, convolutions and attention; all else is small beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from wanx.config.models import DiTConfig, ImageEncoderConfig, TextEncoderConfig, VAEConfig


@dataclass(frozen=True)
class MultiplyAdds:
    """Multiply-adds of one call.

    Attributes:
        linears: those of linears, which bundles may quantise.
        others: those of attention and convolutions.
    """

    linears: float
    others: float = 0.0

    def __add__(self, other: MultiplyAdds) -> MultiplyAdds:
        return MultiplyAdds(self.linears + other.linears, self.others + other.others)

    def __mul__(self, count: float) -> MultiplyAdds:
        return MultiplyAdds(self.linears * count, self.others * count)


def denoiser(config: DiTConfig, tokens: int) -> MultiplyAdds:
    """One forward of the denoiser, of one guidance branch.

    Args:
        config: sizes of the network.
        tokens: length of the sequence.
    """
    dim, text = config.dim, config.text_len
    # Queries, keys, values and output of self attention; queries and output of cross attention.
    block = MultiplyAdds(
        tokens * (6 * dim**2 + 2 * dim * config.ffn_dim) + text * 2 * dim**2,
        2 * tokens * (tokens + text) * dim,
    )
    ends = MultiplyAdds(
        tokens * dim * (config.token_dim + config.velocity_dim)
        + text * (config.text_dim * dim + dim**2)
        + dim * (config.freq_dim + 7 * dim)  # of the timestep
    )
    if config.image_dim is not None:
        image = config.image_tokens * config.image_frames
        block += MultiplyAdds(image * 2 * dim**2, 2 * tokens * image * dim)
        ends += MultiplyAdds(image * (config.image_dim**2 + config.image_dim * dim))
    hints = len(config.vace_layers)
    if hints:
        ends += MultiplyAdds(
            tokens * dim * (config.vace_in_dim * config.patch_volume + (hints + 1) * dim)
        )
    return block * (config.num_layers + hints) + ends


def text_encoder(config: TextEncoderConfig, tokens: int) -> MultiplyAdds:
    """A prompt of a number of tokens."""
    inner = config.num_heads * config.head_dim
    layer = MultiplyAdds(
        tokens * config.dim * (4 * inner + 3 * config.ffn_dim), 2 * tokens**2 * inner
    )
    return layer * config.num_layers


def image_encoder(config: ImageEncoderConfig) -> MultiplyAdds:
    """An image."""
    tokens = config.tokens
    layer = MultiplyAdds(
        tokens * config.dim * (4 * config.dim + 2 * config.ffn_dim), 2 * tokens**2 * config.dim
    )
    patches = MultiplyAdds(0, (tokens - 1) * config.dim * 3 * config.patch_size**2)
    return layer * config.used_layers + patches


def vae_decoder(config: VAEConfig, times: int, height: int, width: int) -> MultiplyAdds:
    """A latent of so many frames, rows and columns."""
    dims = [config.base_dim * m for m in (config.multipliers[-1], *config.multipliers[::-1])]
    deep, places = dims[0], float(height * width)
    count = times * places * (config.z_dim**2 + 27 * config.z_dim * deep)
    count += _middle(deep, times, places)
    frames = times
    for level, (in_dim, out_dim) in enumerate(pairwise(dims)):
        entered = in_dim if level == 0 else in_dim // 2  # the upsampling halves the channels
        count += frames * places * _residual_blocks(entered, out_dim, config.num_res_blocks + 1)
        if level < len(config.multipliers) - 1:
            if config.temporal_downsample[::-1][level]:
                count += (frames - 1) * places * 3 * out_dim * 2 * out_dim
                frames = 2 * frames - 1
            places *= 4
            count += frames * places * 9 * out_dim * (out_dim // 2)
    return MultiplyAdds(0, count + frames * places * 27 * dims[-1] * 3)


def vae_encoder(config: VAEConfig, frames: int, height: int, width: int) -> MultiplyAdds:
    """A clip of so many frames, whose latent has so many rows and columns."""
    dims = [config.base_dim * m for m in (1, *config.multipliers)]
    places = float(height * width * config.spatial_stride**2)
    count = frames * places * 27 * 3 * dims[0]
    for level, (in_dim, out_dim) in enumerate(pairwise(dims)):
        count += frames * places * _residual_blocks(in_dim, out_dim, config.num_res_blocks)
        if level < len(config.multipliers) - 1:
            places /= 4
            count += frames * places * 9 * out_dim**2
            if config.temporal_downsample[level]:
                frames = 1 + (frames - 1) // 2
                count += (frames - 1) * places * 3 * out_dim**2
    moments = 2 * config.z_dim
    count += _middle(dims[-1], frames, places)
    return MultiplyAdds(0, count + frames * places * (27 * dims[-1] * moments + moments**2))


def _residual_blocks(in_dim: int, out_dim: int, count: int) -> int:
    """For each pixel; the first block changes the number of channels."""
    shortcut = in_dim * out_dim if in_dim != out_dim else 0
    return 27 * (in_dim * out_dim + (2 * count - 1) * out_dim**2) + shortcut


def _middle(dim: int, frames: int, places: float) -> float:
    """Two residual blocks, and attention within each frame."""
    blocks = _residual_blocks(dim, dim, 2)
    return frames * places * (blocks + 4 * dim**2 + 2 * places * dim)
