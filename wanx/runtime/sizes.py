"""Which video sizes a model can draw, and how large their latents are."""

from __future__ import annotations

from wanx.config import ModelConfig, VAEConfig
from wanx.errors import UsageError


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
        UsageError: It is not; the message names every wrong value and the nearest valid ones.
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


def _problem(name: str, value: int, step: int, offset: int = 0) -> str:
    """Empty if ``value`` is ``step·n + offset`` for some n >= 1, otherwise what to use instead."""
    smallest = step + offset
    below = max(smallest, value - (value - offset) % step)
    if value == below:
        return ""
    nearest = f"{below}" if value < below else f"{below} or {below + step}"
    rule = f"a multiple of {step}" if offset == 0 else f"{step}n+{smallest % step}"
    return f"{name} must be {rule} and at least {smallest}, not {value}: use {nearest}"
