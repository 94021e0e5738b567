"""Conversion between latents [C, T, H, W] and tokens, and the tokens' position embeddings.

A token is one patch of the latent; tokens run over time, then height, then width. The two feature
orders are those of the checkpoint: the patch embedding is a convolution whose weight is
[dim, C, pt, ph, pw], and the head writes (pt, ph, pw, C).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Triple = tuple[int, int, int]

PATCH: Triple = (1, 2, 2)


def token_grid(latent_shape: tuple[int, ...], patch: Triple = PATCH) -> Triple:
    """Tokens along time, height and width for a latent of shape (C, T, H, W).

    Raises:
        ValueError: The patch does not divide the latent.
    """
    _, *sizes = latent_shape
    t, h, w = (size // side for size, side in zip(sizes, patch, strict=True))
    if (t * patch[0], h * patch[1], w * patch[2]) != tuple(sizes):
        raise ValueError(f"patch {patch} does not divide the latent {tuple(latent_shape)}")
    return t, h, w


def patchify(latent: Float32, patch: Triple = PATCH) -> Float32:
    """Cut a latent [C, T, H, W] into tokens [L, C·pt·ph·pw].

    A Linear with the convolution's weight reshaped to [dim, C·pt·ph·pw] then equals the patch
    embedding.

    Raises:
        ValueError: The patch does not divide the latent.
    """
    t, h, w = token_grid(latent.shape, patch)
    pt, ph, pw = patch
    cells = latent.reshape(-1, t, pt, h, ph, w, pw).transpose(1, 3, 5, 0, 2, 4, 6)
    return np.ascontiguousarray(cells.reshape(t * h * w, -1))


def unpatchify(tokens: Float32, grid: Triple, patch: Triple = PATCH) -> Float32:
    """Assemble the head's tokens [L, pt·ph·pw·C], C fastest, into a latent [C, T, H, W].

    Args:
        tokens: Output of the transformer.
        grid: Tokens along time, height and width, with product L.
        patch: Latent cells of one token along the same axes.

    Raises:
        ValueError: The number of tokens or of features does not fit.
    """
    t, h, w = grid
    pt, ph, pw = patch
    if len(tokens) != t * h * w:
        raise ValueError(f"{len(tokens)} tokens do not fill the grid {grid}")
    cells = tokens.reshape(t, h, w, pt, ph, pw, -1).transpose(6, 0, 3, 1, 4, 2, 5)
    return np.ascontiguousarray(cells.reshape(-1, t * pt, h * ph, w * pw))


def rope_tables(grid: Triple, dims: Triple, theta: float = 10000.0) -> tuple[Float32, Float32]:
    """Cosines and sines of the rotary position embedding (Su et al. 2021), one per feature pair.

    Pair k of an axis with d dimensions turns by ``position · theta^(-2k/d)``; a token's pairs are
    those of time, height and width, one after the other. Computed in float64.

    Args:
        grid: Tokens along time, height and width.
        dims: Rotary dimensions of the three axes, even, adding up to the head's width.
        theta: Base of the frequencies.

    Returns:
        Two float32 arrays [L, sum(dims) / 2].
    """
    positions = np.indices(grid).reshape(3, -1, 1)
    angles = np.concatenate(
        [
            position * theta ** (-np.arange(0, dim, 2) / dim)
            for position, dim in zip(positions, dims, strict=True)
        ],
        axis=1,
    )
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
