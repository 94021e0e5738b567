"""Runs single components of a bundle the way the pipeline does."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wanx.bundle.reader import Bundle
from wanx.runtime.sessions import open_session
from wanx.runtime.sessions.base import State
from wanx.runtime.tokens import patchify, rope_tables, token_grid, unpatchify

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


def run_vae_encoder(bundle: Bundle, video: Float32) -> Float32:
    """Normalised latent [C, T, h, w] of the video [3, F, H, W], encoded chunk by chunk."""
    chunk = bundle.manifest.config.vae.temporal_stride
    starts = {"first": [0], "rest": range(1, video.shape[1], chunk)}
    state: State = {}
    parts = []
    for name, indices in starts.items():
        with open_session(bundle, f"vae_encoder_{name}", threads=1) as session:
            for start in indices:
                end = start + (1 if name == "first" else chunk)
                frames = np.ascontiguousarray(video[None, :, start:end])
                parts.append(session.run({"video": frames}, state)["latent"][0])
    return np.concatenate(parts, axis=1)


def run_vae_decoder(bundle: Bundle, latent: Float32) -> Float32:
    """Video [3, F, H, W] of the latent [C, T, h, w], decoded frame by frame."""
    state: State = {}
    parts = []
    for name, chunks in (("first", range(1)), ("rest", range(1, latent.shape[1]))):
        with open_session(bundle, f"vae_decoder_{name}", threads=1) as session:
            for index in chunks:
                chunk = np.ascontiguousarray(latent[None, :, index : index + 1])
                parts.append(session.run({"latent": chunk}, state)["video"][0])
    return np.concatenate(parts, axis=1)
