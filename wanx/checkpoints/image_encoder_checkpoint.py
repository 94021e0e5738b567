"""The image encoder of a checkpoint: CLIP's vision tower, of which Wan2.1 reads all but the end."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from wanx.checkpoints.config_file import ConfigFile
from wanx.checkpoints.inferred_sizes import count_blocks, require_agreement, shape_of
from wanx.checkpoints.weights import ComponentWeights
from wanx.config.models import ImageEncoderConfig
from wanx.errors import CorruptInputError

STEM = "models_clip_open-clip-xlm-roberta-large-vit-huge-14"


def published_sizes(weights: ComponentWeights) -> dict[str, Any]:
    """Sizes that no tensor tells, where there is no config file.

    Raises:
        CorruptInputError: the file lacks tensors that tell sizes.
    """
    published = ImageEncoderConfig()
    if shape_of(weights, "patch_embedding.weight", 4)[0] == published.dim:
        # A file without the last layer, which nobody reads, would pass for a shallower tower.
        return {"num_layers": published.num_layers}
    return {}


def diffusers_image_encoder_fields(config: ConfigFile) -> dict[str, Any]:
    """Fields of :class:`ImageEncoderConfig` in image_encoder/config.json."""
    config.require("model_type", "clip_vision_model")
    config.values.setdefault("hidden_act", "quick_gelu")  # what transformers takes it for
    config.require("hidden_act", "gelu")
    config.require("num_channels", 3)
    return {
        "dim": config.size("hidden_size"),
        "ffn_dim": config.size("intermediate_size"),
        "num_heads": config.size("num_attention_heads"),
        "num_layers": config.size("num_hidden_layers"),
        "patch_size": config.size("patch_size"),
        "image_size": config.size("image_size"),
        "eps": config.epsilon("layer_norm_eps"),
    }


def drop_last_layer(
    weights: ComponentWeights, fields: dict[str, Any], source: Path
) -> tuple[ComponentWeights, ImageEncoderConfig]:
    """Leave out the last layer, which no network reads, and tell the sizes.

    Args:
        weights: with the last layer.
        fields: what a config file says.
        source: the file that says it, for messages.

    Raises:
        CorruptInputError: as :func:`image_encoder_config`.
    """
    config = image_encoder_config(fields, weights, source)
    last = f"transformer.{config.used_layers}."
    tensors = {name: t for name, t in weights.tensors.items() if not name.startswith(last)}
    return replace(weights, tensors=tensors), config


def image_encoder_config(
    fields: dict[str, Any], weights: ComponentWeights, source: Path
) -> ImageEncoderConfig:
    """Join the fields of a config file, if any, with what the tensors tell.

    Args:
        fields: what a config file says.
        weights: the tensors, with the last layer.
        source: the file that says it, for messages.

    Raises:
        CorruptInputError: the two disagree, or tensors that tell sizes are missing.
    """
    dim, _, patch, _ = shape_of(weights, "patch_embedding.weight", 4)
    positions = shape_of(weights, "pos_embedding", 3)[1]
    inferred = {
        "dim": dim,
        "ffn_dim": shape_of(weights, "transformer.0.mlp.0.weight", 2)[0],
        "num_layers": count_blocks(weights, "transformer"),
        "patch_size": patch,
        "image_size": patch * math.isqrt(positions - 1),
    }
    require_agreement(fields, inferred, source)
    config = ImageEncoderConfig(**{**fields, **inferred})
    square = positions > 1 and config.tokens == positions
    if not square or config.dim % config.num_heads or config.num_layers < 2:
        raise CorruptInputError(
            f"{source}: {config.num_heads} heads, {config.num_layers} layers and {positions} "
            f"positions make no image encoder of width {dim}; download the file again"
        )
    return config
