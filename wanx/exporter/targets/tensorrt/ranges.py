"""Ranges of the dynamic axes of engines, from the videos that a model makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from wanx.config.models import ModelConfig
from wanx.errors import UsageError
from wanx.runtime.sizes import check_latent

# 81 frames of 1280x720, the largest videos of Wan2.1; smaller models have smaller limits.
MAX_TOKENS = 75_600
MAX_SIDE = 1280
MIN_SIDE = 16  # a token
# With a smaller min size TensorRT-RTX 1.7 takes FP8 attention apart: with 16, but not with 32.
FP8_TOKENS = 32
_SMALL_DIM = 1024


@dataclass(frozen=True, kw_only=True)
class Range:
    """Sizes of a dynamic axis: from ``min`` to ``max``, and fastest at ``opt``."""

    min: int
    opt: int
    max: int


def ranges(
    config: ModelConfig,
    *,
    fp8_attention: bool = False,
    sizes: Sequence[tuple[int, int]] = (),
    frames: int | None = None,
) -> Mapping[str, Range]:
    """Compute the range of each dynamic axis.

    Args:
        config: of the model.
        fp8_attention: whether attention is one kernel in FP8, which needs ``FP8_TOKENS``.
        sizes: width and height in pixels of the videos to cover, the usual one first; without any
            the model's own size is usual, and all that Wan2.1 makes are covered.
        frames: of the longest video; None is the model's own number.

    Returns:
        By axis: ``L`` tokens, ``B`` branches at once, ``n`` words, ``h`` and ``w`` of a latent.

    Raises:
        UsageError: there is no video of a size, or none that is so large.
    """
    if frames is not None and frames < 1:
        raise UsageError(f"--frames {frames}: a video has 1 or more")
    if small := [size for size in sizes if min(size) < MIN_SIDE]:
        width, height = small[0]
        raise UsageError(f"--sizes {width}x{height}: sides are {MIN_SIDE} pixels or more")
    defaults, stride = config.defaults, config.vae.spatial_stride
    longest = frames or defaults.frames
    for width, height in sizes or [(defaults.width, defaults.height)]:
        check_latent(width, height, longest, config)
    cells = [(h // stride, w // stride) for w, h in sizes or [(defaults.width, defaults.height)]]
    tokens = [_tokens(config, longest, h, w) for h, w in cells]
    (height, width), most_tokens = cells[0], max(tokens)
    tallest, widest = (max(sides) for sides in zip(*cells, strict=True))
    if not sizes:
        tiny = config.dit.dim < _SMALL_DIM
        most_tokens = 4 * most_tokens if tiny else max(most_tokens, MAX_TOKENS)
        side = 2 * max(height, width) if tiny else MAX_SIDE // stride
        tallest, widest = max(tallest, side), max(widest, side)
    return {
        "L": Range(min=FP8_TOKENS if fp8_attention else 1, opt=tokens[0], max=most_tokens),
        "B": Range(min=1, opt=1, max=2),
        "n": Range(min=1, opt=64, max=config.dit.text_len),
        "h": Range(min=1, opt=height, max=tallest),
        "w": Range(min=1, opt=width, max=widest),
    }


def _tokens(config: ModelConfig, frames: int, height: int, width: int) -> int:
    steps = (frames - 1) // config.vae.temporal_stride + 1
    t, h, w = config.dit.patch_size
    return (steps // t) * (height // h) * (width // w)
