"""Control input of VACE: sampled frames, the two halves of a control video, its mask.

The formulas are those of VACE's reference; arrays are numpy and nothing here runs a network.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def sample_frames(times: NDArray[np.floating], count: int) -> list[int]:
    """Choose the frames that are seen at ``count`` moments at equal distances.

    The first moment is 0, the last is the middle of the last frame, which is kept. A frame is seen
    from its beginning to its end inclusive, and the earlier of two that meet wins. Where no frame
    is seen, it is the last one that has begun, or the first of all. Times of frames are rounded to
    float32 as in the reference.

    Args:
        times: [n, 2], the seconds at which each frame begins and ends, in ascending order.
        count: Number of moments.

    Returns:
        ``count`` numbers of frames from 0 to n - 1, ascending.
    """
    starts, ends = times.astype(np.float32).T
    # A Python float, so that the moments are float64 as with NumPy 1, which the reference demands.
    moments = np.linspace(0.0, float((starts[-1] + ends[-1]) / 2), count)
    not_over = np.searchsorted(ends, moments)
    begun = np.maximum(np.searchsorted(starts, moments, side="right") - 1, 0)
    return [int(number) for number in np.minimum(not_over, begun)]


def mask_values(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The mask that a video shows: its first channel, black is 0 and white is 1.

    clamp((x/127.5 - 1 + 1) / 2, 0, 1) step by step in float32, to which the rounding belongs.

    Args:
        pixels: uint8 [F, H, W, 3].

    Returns:
        float32 [F, H, W], 1 where VACE is to draw and 0 where the control video stays.
    """
    scaled = pixels[..., 0].astype(np.float32) / np.float32(127.5) - np.float32(1)
    halved: NDArray[np.float32] = (scaled + np.float32(1)) / np.float32(2)
    return halved.clip(0, 1)


def split_by_mask(
    video: NDArray[np.float32], mask: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Part a control video into what stays and what is drawn anew; 0 is grey.

    Args:
        video: float32 [C, F, H, W] in -1 to 1.
        mask: float32 [F, H, W]; m is 1 where it exceeds 0.5 and 0 elsewhere.

    Returns:
        (inactive, reactive), both float32 [C, F, H, W]: video·(1 - m) and video·m.
    """
    chosen = (mask > 0.5).astype(np.float32)
    return video * (1 - chosen), video * chosen


def mask_latent(
    mask: NDArray[np.float32], latent_frames: int, stride: int = 8
) -> NDArray[np.float32]:
    """The mask in the shape of a latent: every pixel of a cell becomes a channel.

    Channel = row in the cell · stride + column in the cell, values as they are, without threshold.
    In time the nearest frame is taken: ⌊(i + 1/2)·F / T⌋, torch's ``nearest-exact``.

    Args:
        mask: float32 [F, H, W], H and W multiples of ``stride``.
        latent_frames: T, which is ⌊(F + 3) / 4⌋ with the VAE of Wan2.1.
        stride: Pixels along the side of a latent cell.

    Returns:
        float32 [stride², T, H / stride, W / stride].
    """
    frames, height, width = mask.shape
    nearest = (2 * np.arange(latent_frames) + 1) * frames // (2 * latent_frames)
    cells = mask[nearest].reshape(latent_frames, height // stride, stride, width // stride, stride)
    latent: NDArray[np.float32] = cells.transpose(2, 4, 0, 1, 3).reshape(
        stride**2, latent_frames, height // stride, width // stride
    )
    return latent


def with_references(
    latents: NDArray[np.float32],
    references: Sequence[NDArray[np.float32]],
    mask: NDArray[np.float32],
) -> NDArray[np.float32]:
    """The input of VACE's hint blocks: reference images first in time, then the control video.

    A reference fills the inactive half of the channels; its reactive half and its mask are zero.

    Args:
        latents: float32 [2z, T, h, w], the inactive half before the reactive half; z is 16.
        references: float32 [z, 1, h, w] each, the latents of n images.
        mask: float32 [m, T, h, w] as ``mask_latent`` gives it; m is 64.

    Returns:
        float32 [2z + m, n + T, h, w].
    """
    padded = [np.concatenate([each, np.zeros_like(each)]) for each in references]
    blank = np.zeros((len(mask), len(references), *mask.shape[2:]), dtype=mask.dtype)
    return np.concatenate(
        [np.concatenate([*padded, latents], axis=1), np.concatenate([blank, mask], axis=1)]
    )
