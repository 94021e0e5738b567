"""Random inputs of the networks, for timing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wanx.config.models import ModelConfig
from wanx.runtime.sessions.base import Array
from wanx.runtime.tokens import rope_tables


@dataclass(frozen=True, kw_only=True, eq=False)
class Feeds:
    """Inputs of one call of the transformer.

    Attributes:
        constants: what is bound once: rotary tables, image features.
        branches: for each guidance branch ``tokens`` ``[1, L, token_dim]``, ``timestep`` ``[1]``
            and ``context`` ``[1, text_len, text_dim]``; all float32 and normally distributed.
    """

    constants: dict[str, Array]
    branches: list[dict[str, Array]]


def dit_feeds(config: ModelConfig, grid: tuple[int, int, int], branches: int = 2) -> Feeds:
    """Inputs of a transformer for a grid of tokens along time, height and width."""
    draw, dit = np.random.default_rng(0), config.dit

    def normal(*shape: int) -> Array:
        return draw.standard_normal(shape, np.float32)

    length = int(np.prod(grid))
    cos, sin = rope_tables(grid, dit.rope_dims)
    constants: dict[str, Array] = {"rope_cos": cos, "rope_sin": sin}
    if dit.image_dim is not None:
        images = dit.image_frames * dit.image_tokens
        constants["image_context"] = normal(1, images, dit.image_dim)
    if dit.vace_layers:
        constants["vace_tokens"] = normal(1, length, dit.vace_in_dim * dit.patch_volume)
        constants["vace_scale"] = np.ones(len(dit.vace_layers), np.float32)
    shared = {"tokens": normal(1, length, dit.token_dim), "timestep": np.full(1, 500, np.float32)}
    texts = [normal(1, dit.text_len, dit.text_dim) for _ in range(branches)]
    return Feeds(constants=constants, branches=[shared | {"context": text} for text in texts])
