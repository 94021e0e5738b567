"""Sizes of videos: the valid ones, those that inputs set, and the shapes of latents."""

from __future__ import annotations

import logging
import math

from wanx.config.bounds import MAX_LATENT_VALUES
from wanx.config.models import ModelConfig, VAEConfig
from wanx.errors import UsageError

MAX_USUAL_ASPECT = 8
MAX_POSITIONS = 1024  # along a side, in patches: those for which the reference has embeddings
_log = logging.getLogger("wanx.runtime")


def latent_shape(width: int, height: int, frames: int, vae: VAEConfig) -> tuple[int, int, int, int]:
    """Shape (C, T, H, W) of the latent of a video.

    Args:
        width: Pixels, a multiple of the VAE's spatial stride.
        height: Likewise.
        frames: A multiple of the VAE's temporal stride, plus 1: the first frame stands alone.
        vae: Strides and number of channels.
    """
    stride = vae.spatial_stride
    time = (frames - 1) // vae.temporal_stride + 1
    return vae.z_dim, time, height // stride, width // stride


def check_size(width: int, height: int, frames: int, config: ModelConfig) -> None:
    """Check that the latent of a video exists and is a whole number of patches.

    Raises:
        UsageError: It is not, and the message names every wrong value and the nearest valid ones;
            or it has more than ``MAX_LATENT_VALUES``.
    """
    stride, temporal_stride = config.vae.spatial_stride, config.vae.temporal_stride
    patch_time, patch_height, patch_width = config.dit.patch_size
    problems = [
        _problem("width", width, stride * patch_width),
        _problem("height", height, stride * patch_height),
        _problem("frames", frames, temporal_stride * patch_time, 1 - temporal_stride),
    ]
    if any(problems):
        raise UsageError("; ".join(filter(None, problems)))
    check_latent(width, height, frames, config)


def check_latent(width: int, height: int, frames: int, config: ModelConfig) -> None:
    """Check that the latent of a video has at most ``MAX_LATENT_VALUES``.

    Raises:
        UsageError: It has more.
    """
    values = math.prod(latent_shape(width, height, frames, config.vae))
    if values > MAX_LATENT_VALUES:
        raise UsageError(
            f"{frames} frames of {width}x{height} have a latent of {values:,} values; choose a "
            f"size or length of at most {MAX_LATENT_VALUES:,}"
        )


def size_for_image(height: int, width: int, area: float, config: ModelConfig) -> tuple[int, int]:
    """Choose the size of a video that begins with an image: its aspect, and about a given area.

    The rule of the published pipelines, in fp64 with all its rounding: an image of 832x480 becomes
    a video of 832x464 where the area is 832·480. A side shorter than a patch becomes one, unless a
    side of the image is more than ``MAX_USUAL_ASPECT`` times the other, of which a warning is
    logged.

    Args:
        height: Pixels of the image.
        width: Likewise.
        area: Pixels of one frame to aim at.
        config: Stride of the VAE and patch of the DiT.

    Returns:
        Width and height, each a whole number of patches.

    Raises:
        UsageError: The image is so long and thin that the video would be less than a patch wide, or
            more than ``MAX_POSITIONS`` long.
    """
    aspect = height / width
    stride = config.vae.spatial_stride
    patches = config.dit.patch_size[1:]
    sides = (math.sqrt(area * aspect), math.sqrt(area / aspect))
    counts = [
        round(side // stride // patch * patch) // patch
        for side, patch in zip(sides, patches, strict=True)
    ]
    if max(height, width) > MAX_USUAL_ASPECT * min(height, width):
        if not 1 <= min(counts) <= max(counts) <= MAX_POSITIONS:
            raise UsageError(
                f"the image is {width}x{height}, and its video would have {counts[1]}x{counts[0]} "
                f"patches, not 1 to {MAX_POSITIONS} along each side; crop it"
            )
        _log.warning(
            "the image is %dx%d, longer and thinner than the videos that models are trained on; "
            "crop it if the result is poor", width, height,
        )  # fmt: skip
    rows, columns = (
        stride * patch * max(1, count) for count, patch in zip(counts, patches, strict=True)
    )
    return columns, rows


def control_shape(
    frames: int, height: int, width: int, *, area: int, max_tokens: int, config: ModelConfig
) -> tuple[int, int, int]:
    """Size of the video that is made from a control video of any size.

    With S = ``max_tokens`` and p = the pixels along the side of one token, in tokens:
    a = min(S, area / p², ⌊h/p⌋⌊w/p⌋) per frame at most, T = min(⌊(n - 1) / t⌋ + 1, ⌊S/a⌋) latent
    frames of t frames each, and a' = min(a, ⌊S/T⌋) per frame in the shape of the source:
    rows = round(√(a'·h/w)), columns = ⌊a' / rows⌋.

    Args:
        frames: Number of frames of the control video, n.
        height: Its pixels, h.
        width: Its pixels, w.
        area: Pixels of one frame at most: 1280·720, or 832·480.
        max_tokens: Tokens of the whole video at most: 75,600 at 720P, 32,760 at 480P.
        config: Strides of the VAE and size of a patch.

    Returns:
        (frames, height, width): t(T - 1) + 1 frames, p·rows and p·columns pixels.

    Raises:
        UsageError: The video has no frames, or a side is too short for one token.
    """
    patch_time, patch_height, patch_width = config.dit.patch_size
    step = config.vae.temporal_stride * patch_time
    token_height = config.vae.spatial_stride * patch_height
    token_width = config.vae.spatial_stride * patch_width
    if frames < 1:
        raise UsageError(f"the control video has {frames} frames; give one that has any")
    if height < token_height or width < token_width:
        raise UsageError(
            f"the control video is {width}x{height}; it must be {token_width}x{token_height} at "
            f"least"
        )
    largest = min(
        max_tokens,
        area / (token_height * token_width),
        (height // token_height) * (width // token_width),
    )
    times = min((frames - 1) // step + 1, int(max_tokens / largest))
    tokens = min(largest, int(max_tokens / times))
    rows = round(math.sqrt(tokens * (height / width)))
    columns = int(tokens / rows) if rows else 0
    if not columns:
        raise UsageError(
            f"the control video is {width}x{height}, too long and thin for {tokens:g} tokens a "
            f"frame; crop it"
        )
    return step * (times - 1) + 1, token_height * rows, token_width * columns


def _problem(name: str, value: int, step: int, offset: int = 0) -> str:
    """Empty if ``value`` is ``step·n + offset`` for some n >= 1, otherwise what to use instead."""
    smallest = step + offset
    below = max(smallest, value - (value - offset) % step)
    if value == below:
        return ""
    nearest = f"{below}" if value < below else f"{below} or {below + step}"
    rule = f"a multiple of {step}" if offset == 0 else f"{step}n+{smallest % step}"
    return f"{name} must be {rule} and at least {smallest}, not {value}: use {nearest}"


def parse_size(text: str) -> tuple[int, int]:
    """Read ``832x480``, width and height, also with ``*`` or ``×``.

    Raises:
        UsageError: It is something else.
    """
    width, _, height = text.lower().replace("*", "x").replace("×", "x").partition("x")
    if not (width.isdecimal() and height.isdecimal() and len(text) < 20):
        raise UsageError(f"{text[:40]!r} is not a size; write WIDTHxHEIGHT, such as 832x480")
    return int(width), int(height)
