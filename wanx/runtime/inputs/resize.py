"""Fitting images to a size, each network and task in the way it was trained with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from wanx.config.models import CLIP_MEAN, CLIP_STD
from wanx.runtime.inputs.image import MAX_PIXELS

Floats = NDArray[np.float32]
Weights = list[Floats]

_WHITE = 1.0
_KEYS_A = -0.75


def resize_bicubic(image: Floats, height: int, width: int) -> Floats:
    """Interpolate by cubic convolution (Keys 1981, a = -0.75), without antialiasing.

    Equals ``interpolate(mode="bicubic", align_corners=False)`` of PyTorch.

    Args:
        image: [..., H, W].
        height: Rows of the result, at least 1.
        width: Columns of the result, at least 1.
    """
    return _resize(image, height, width, _cubic_weights)


def resize_bilinear(image: Floats, height: int, width: int) -> Floats:
    """Interpolate linearly, without antialiasing; otherwise as ``resize_bicubic``."""
    return _resize(image, height, width, _linear_weights)


def cover(
    pixels: NDArray[np.uint8], height: int, width: int, *, pixel_aspect: float = 1.0
) -> NDArray[np.uint8]:
    """Scale an image until it covers a size, antialiased, and cut out the centre.

    Args:
        pixels: [H, W, 3].
        height: Rows of the result, at least 1.
        width: Columns of the result, at least 1.
        pixel_aspect: Width of a pixel of ``pixels`` by its height; those of the result are square.
    """
    from PIL import Image

    rows, columns = pixels.shape[:2]
    shown = columns * pixel_aspect
    scale = max(height / rows, width / shown)
    scaled_height = max(height, round(rows * scale))
    scaled_width = max(width, round(shown * scale))
    top, left = (scaled_height - height) // 2, (scaled_width - width) // 2
    image = Image.fromarray(pixels)
    if scaled_height * scaled_width <= MAX_PIXELS:
        scaled = image.resize((scaled_width, scaled_height), Image.Resampling.BICUBIC)
        return np.array(scaled.crop((left, top, left + width, top + height)))
    # Of a very long image only the part that is kept can be scaled; its rounding differs a little.
    across, down = columns / scaled_width, rows / scaled_height
    part = (
        left * across,
        top * down,
        min((left + width) * across, columns),
        min((top + height) * down, rows),
    )
    return np.array(image.resize((width, height), Image.Resampling.BICUBIC, box=part))


def letterbox(image: Floats, height: int, width: int) -> Floats:
    """Scale an image until it fits into a size, and centre it on white.

    Args:
        image: [3, H, W] in [-1, 1].
        height: Rows of the result, at least 1.
        width: Columns of the result, at least 1.
    """
    rows, columns = image.shape[-2:]
    scale = min(height / rows, width / columns)
    new_height, new_width = max(1, int(rows * scale)), max(1, int(columns * scale))
    top, left = (height - new_height) // 2, (width - new_width) // 2
    canvas = np.full((*image.shape[:-2], height, width), _WHITE, dtype=np.float32)
    canvas[..., top : top + new_height, left : left + new_width] = resize_bilinear(
        image, new_height, new_width
    )
    return canvas


def clip_pixels(image: Floats, size: int = 224) -> Floats:
    """Make the input of CLIP: squashed to a square, neither cropped nor antialiased.

    Args:
        image: [3, H, W] in [-1, 1].
        size: Rows and columns of the result.

    Returns:
        [3, size, size], normalised by CLIP's mean and standard deviation.
    """
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    unit = resize_bicubic(image, size, size) * np.float32(0.5) + np.float32(0.5)
    return np.asarray((unit - mean) / std)


def _resize(
    image: Floats,
    height: int,
    width: int,
    weights_of: Callable[[Floats], tuple[int, Weights]],
) -> Floats:
    """Interpolate along one axis and then the other, first along the one that shrinks more."""
    targets = {-2: height, -1: width}
    for axis in sorted(targets, key=lambda axis: targets[axis] / image.shape[axis]):
        size, target = image.shape[axis], targets[axis]
        # PyTorch computes positions in fp32, with a fused multiply-add: fp64 rounded once.
        step = np.float64(np.float32(size) / np.float32(target))
        position = (step * (np.arange(target) + 0.5) - 0.5).astype(np.float32)
        below = np.floor(position)
        offset, weights = weights_of(position - below)
        shape = list(image.shape)
        shape[axis] = target
        total = np.zeros(shape, np.float32)
        for tap, weight in enumerate(weights, offset):
            index = np.clip(below.astype(np.intp) + tap, 0, size - 1)
            values = np.take(image, index, axis=axis)
            values *= weight if axis == -1 else weight[:, None]
            total += values
        image = total
    return image


def _linear_weights(fraction: Floats) -> tuple[int, Weights]:
    """Weights of the samples 0 and 1 for a position between them; see ``_cubic_weights``."""
    return 0, [1 - fraction, fraction]


def _cubic_weights(fraction: Floats) -> tuple[int, Weights]:
    """Weights of the samples -1, 0, 1 and 2 for a position between 0 and 1.

    Returns:
        The first of these samples, and for each its weights at every position.
    """
    a = _KEYS_A

    def near(x: Floats) -> Floats:  # up to a distance of 1
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: Floats) -> Floats:  # from 1 to 2
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    return -1, [far(fraction + 1), near(fraction), near(1 - fraction), far(2 - fraction)]
