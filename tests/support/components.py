"""Runs single components of a bundle the way the pipeline does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from wanx.bundle.reader import Bundle
from wanx.runtime.run_parts import RunParts
from wanx.runtime.sessions import open_session
from wanx.runtime.sizes import latent_shape
from wanx.runtime.tokens import patchify, rope_tables, token_grid, unpatchify
from wanx.runtime.vae.decode import floats

Float32 = NDArray[np.float32]


def run_text_encoder(bundle: Bundle, ids: NDArray[np.int64]) -> Float32:
    """Features [1, n, D] of the ids [1, n]."""
    with open_session(bundle, "text_encoder", threads=1) as session:
        return session.run({"ids": ids})["features"]


def run_image_encoder(bundle: Bundle, pixels: Float32) -> Float32:
    """Features [1, tokens, D] of the pixels [1, 3, S, S]."""
    with open_session(bundle, "image_encoder", threads=1) as session:
        return session.run({"pixels": pixels})["features"]


def run_dit(
    bundle: Bundle, latent: Float32, timestep: float, context: Float32, **extra: Float32
) -> Float32:
    """Velocity [C, T, h, w] at the latent [C, T, h, w] for the text features [1, 512, D].

    ``extra`` are further inputs of the graph: ``image_context`` or ``vace_tokens``, ``vace_scale``.
    """
    dit = bundle.manifest.config.dit
    grid = token_grid(latent.shape, dit.patch_size)
    cos, sin = rope_tables(grid, dit.rope_dims)
    feeds = {
        "tokens": patchify(latent, dit.patch_size)[None],
        "timestep": np.array([timestep], dtype=np.float32),
        "context": context,
        **extra,
    }
    with open_session(bundle, "dit", threads=1) as session:
        session.bind({"rope_cos": cos, "rope_sin": sin})
        return unpatchify(session.run(feeds)["velocity"][0], grid, dit.patch_size)


def run_vae_encoder(bundle: Bundle, video: Float32, tile_area: int | None = None) -> Float32:
    """Normalised latent [C, T, h, w] of the video [3, F, H, W], encoded chunk by chunk."""
    parts = replace(RunParts.of(bundle, threads=1), tile_area=tile_area)
    _, *size = latent_shape(video.shape[3], video.shape[2], video.shape[1], parts.config.vae)
    clip = (lambda start, end: video[:, start:end]), video.shape[1]
    (latent,) = parts.encode_clips([clip], size)
    return latent


def run_vae_decoder(bundle: Bundle, latent: Float32, tile_area: int | None = None) -> Float32:
    """Video [3, F, H, W] of the latent [C, T, h, w], decoded frame by frame."""
    parts = replace(RunParts.of(bundle, threads=1), tile_area=tile_area)
    return np.moveaxis(np.concatenate(list(parts.decode(latent, floats))), -1, 0)
