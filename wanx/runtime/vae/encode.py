"""Encoding of clips: features, in tiles where asked for, then the latents of whole frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wanx.config.models import VAEConfig
from wanx.runtime.sessions.base import OpenSession
from wanx.runtime.vae.chunks import calls
from wanx.runtime.vae.tiles import Tile, Tiling, whole

Float32 = NDArray[np.float32]
Clip = Callable[[int, int], Float32]  # frames from and to -> [3, frames, H, W] in [-1, 1]


def encode(
    clips: Sequence[tuple[Clip, int]],
    tiling: Tiling,
    config: VAEConfig,
    open_session: OpenSession,
    fits: Callable[[Tile], bool] = lambda tile: True,
) -> list[Float32]:
    """Encode clips of one size, chunk by chunk.

    Args:
        clips: each with its number of frames.
        tiling: of their frames, with the border that the encoder needs.
        config: of the VAE.
        open_session: gives a component as a context manager, which frees it.
        fits: asked before each tile but the first; one that does not is cut in two.

    Returns:
        Their latents ``[z, T, h, w]``.
    """
    scale, stride = config.spatial_stride, config.temporal_stride
    lengths = [1 + (frames - 1) // stride for _, frames in clips]
    features: list[dict[int, NDArray[Any]]] = [{} for _ in clips]
    for call in calls(open_session, "vae_encoder_down", lengths, tiling, fits):
        rows, columns = call.tile.rows, call.tile.columns
        start = 0 if call.index == 0 else 1 + stride * (call.index - 1)
        frames = clips[call.clip][0](start, 1 + stride * call.index)
        part = frames[None, ..., rows.source(scale), columns.source(scale)]
        feeds = {"video": np.ascontiguousarray(part)}
        found = call.session.run(feeds, call.state)["features"]
        made = features[call.clip]
        if call.index not in made:
            shape = (*found.shape[:3], tiling.height, tiling.width)
            made[call.index] = np.empty(shape, found.dtype)
        place = made[call.index][..., rows.place(), columns.place()]
        place[...] = found[..., rows.inner(), columns.inner()]
    latents: list[list[Float32]] = [[] for _ in clips]
    frames_of_latents = whole(tiling.height, tiling.width)
    for call in calls(open_session, "vae_encoder_mid", lengths, frames_of_latents):
        feeds = {"features": features[call.clip].pop(call.index)}
        latents[call.clip].append(call.session.run(feeds, call.state)["latent"][0])
    return [np.concatenate(parts, axis=1) for parts in latents]
