"""Bounds of a configuration that comes from a file: no number asks for an absurd allocation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from wanx.config.bounds import MAX_LATENT_VALUES
from wanx.config.models import ModelConfig

# Integers of wanx.config.models that need another ceiling than _LARGEST.
_DEFAULT_MAXIMUM = 1 << 16
_MAXIMA = {
    "vocab_size": 1 << 20,
    "num_heads": 1024,
    "num_layers": 1024,
    "num_res_blocks": 64,
    "patch_size": 16,
    "multipliers": 64,
    "image_frames": 64,
    "text_len": 4096,
    "text_dim": 1 << 14,
    "image_tokens": 4096,
    "image_dim": 1 << 14,
    "image_size": 1024,
    "in_dim": 1024,
    "out_dim": 1024,
    "z_dim": 1024,
    "vace_in_dim": 1024,
    "fps": 1000,
    "steps": 10_000,
}
_MAX_TEXT = 20_000


def _leaves(name: str, value: object) -> Iterator[tuple[str, Any]]:
    """Every leaf of a configuration with its dotted name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for item in dataclasses.fields(value):
            yield from _leaves(f"{name}.{item.name}", getattr(value, item.name))
    elif isinstance(value, tuple):
        yield f"{name}.length", len(value)
        for element in value:
            yield from _leaves(name, element)
    else:
        yield name, value


def bounded_config(config: ModelConfig) -> ModelConfig:
    """Refuse sizes that no Wan2.1 has, before anything is allocated from them.

    Raises:
        ValueError: names the first number or text that is out of bounds.
    """
    for name, value in _leaves("config", config):
        leaf = name.rsplit(".", 1)[-1]
        if isinstance(value, str):
            if len(value) > _MAX_TEXT or (
                leaf == "name" and (not value or not value.isprintable())
            ):
                raise ValueError(f"{name} is not an acceptable text ({len(value)} characters)")
        elif isinstance(value, float):
            if not math.isfinite(value) or abs(value) > 1e6:
                raise ValueError(f"{name} is {value}, which is out of range")
        elif value is not None and not isinstance(value, bool):
            minimum = 0 if leaf in ("vace_layers", "length") else 1
            maximum = _MAXIMA.get(leaf, _DEFAULT_MAXIMUM)
            if not minimum <= value <= maximum:
                raise ValueError(f"{name} is {value}, outside {minimum}..{maximum}")
    dit, vae, run = config.dit, config.vae, config.defaults
    image = config.image_encoder
    requirements = {
        "dit.dim must be a multiple of 2 * dit.num_heads": dit.dim % (2 * dit.num_heads) == 0,
        "dit.vace_layers must ascend and name blocks": (
            list(dit.vace_layers) == sorted(set(dit.vace_layers))
            and all(layer < dit.num_layers for layer in dit.vace_layers)
        ),
        "vae.latent_mean and latent_std must have vae.z_dim values, std > 0": (
            len(vae.latent_mean) == len(vae.latent_std) == vae.z_dim and min(vae.latent_std) > 0
        ),
        "vae needs 1 to 8 multipliers and one temporal_downsample less": (
            1 <= len(vae.multipliers) <= 8
            and len(vae.temporal_downsample) == len(vae.multipliers) - 1
        ),
        "eps must be positive": min(dit.eps, config.text_encoder.eps) > 0,
        "image_encoder must be there where dit.image_dim is": (
            (image is None) == (dit.image_dim is None)
        ),
        "defaults.shift must be positive": run.shift > 0,
    }
    if image is not None:
        requirements |= {
            "image_encoder.dim must be a multiple of num_heads": image.dim % image.num_heads == 0,
            "image_encoder.image_size must be a multiple of patch_size": (
                image.image_size % image.patch_size == 0
            ),
            "image_encoder needs 2 layers or more and a positive eps": (
                image.num_layers >= 2 and image.eps > 0
            ),
            "dit.image_dim and image_tokens must be the image_encoder's": (
                (dit.image_dim, dit.image_tokens) == (image.dim, image.tokens)
            ),
        }
    for requirement, holds in requirements.items():
        if not holds:
            raise ValueError(f"config.{requirement}")
    channels = max(dit.in_dim, dit.out_dim, dit.vace_in_dim, vae.z_dim)
    latent_frames = (run.frames - 1) // vae.temporal_stride + 1
    values = run.width * run.height // vae.spatial_stride**2 * latent_frames * channels
    if values > MAX_LATENT_VALUES:
        raise ValueError(f"config.defaults ask for {values} latent values ({MAX_LATENT_VALUES=})")
    return config
