"""Decoding of a latent: features of whole frames, then their pixels, in tiles where asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wanx.config.models import VAEConfig
from wanx.runtime.sessions.base import OpenSession
from wanx.runtime.vae.chunks import calls
from wanx.runtime.vae.tiles import Tile, Tiling, whole

Float32 = NDArray[np.float32]
Convert = Callable[[Float32, int], NDArray[Any]]


def floats(frames: Float32, first: int) -> Float32:
    """Frames as they are, with their channels last."""
    return np.moveaxis(frames, 0, -1)


def decode(
    latent: Float32,
    tiling: Tiling,
    config: VAEConfig,
    open_session: OpenSession,
    convert: Convert,
    measure: Callable[[], AbstractContextManager[None]] = nullcontext,
    on_call: Callable[[], None] = lambda: None,
    fits: Callable[[Tile], bool] = lambda tile: True,
) -> Iterator[NDArray[Any]]:
    """Decode a latent ``[C, T, h, w]``.

    Args:
        latent: clean.
        tiling: of the frames, with the border that the decoder needs.
        config: of the VAE.
        open_session: gives a component as a context manager, which frees it.
        convert: applied to frames ``[3, n, H, W]`` of a tile, with the number of the first of them;
            gives ``[n, H, W, 3]``, each pixel by itself.
        measure: entered around each call of the network.
        on_call: called once the caller is done with what a call gave.
        fits: asked before each tile but the first; one that does not is cut in two.

    Yields:
        The converted frames of each latent frame: one by one without tiles, and after the last
        tile's with them.
    """
    scale, stride = config.spatial_stride, config.temporal_stride
    _, times, height, width = latent.shape
    features: list[NDArray[Any]] = []
    for call in calls(open_session, "vae_decoder_mid", [times], whole(height, width)):
        frame = np.ascontiguousarray(latent[None, :, call.index : call.index + 1])
        features.append(call.session.run({"latent": frame}, call.state)["features"])
    video: NDArray[Any] | None = None
    for call in calls(open_session, "vae_decoder_up", [times], tiling, fits):
        rows, columns = call.tile.rows, call.tile.columns
        first = 0 if call.index == 0 else 1 + stride * (call.index - 1)
        with measure():
            part = features[call.index][..., rows.source(), columns.source()]
            feeds = {"features": np.ascontiguousarray(part)}
            decoded = call.session.run(feeds, call.state)["video"][0]
            frames = convert(decoded[..., rows.inner(scale), columns.inner(scale)], first)
        if len(tiling.tiles) > 1:
            if video is None:
                shape = (1 + stride * (times - 1), height * scale, width * scale, 3)
                video = np.empty(shape, frames.dtype)
            frames_of = video[first : first + len(frames)]
            frames_of[:, rows.place(scale), columns.place(scale)] = frames
            frames = frames_of
        if call.ends_frame:
            yield frames
        on_call()
