"""The image encoder of a checkpoint: CLIP's vision tower, of which Wan2.1 reads all but the end."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from wanx.checkpoints import key_maps
from wanx.checkpoints.component import open_component
from wanx.checkpoints.config_file import ConfigFile
from wanx.checkpoints.inferred_sizes import count_blocks, require_agreement, shape_of
from wanx.checkpoints.weights import ComponentWeights
from wanx.config.models import ImageEncoderConfig
from wanx.errors import CorruptInputError

STEM = "models_clip_open-clip-xlm-roberta-large-vit-huge-14"

ImageEncoderParts = tuple[ComponentWeights, ImageEncoderConfig]


def open_original_image_encoder(source: Path) -> ImageEncoderParts:
    """Open the original layout's file, which holds the whole of CLIP and no config.

    Raises:
        CorruptInputError: the file is damaged, or lacks tensors that tell sizes.
    """
    weights = open_component("image_encoder", source, STEM)
    published = ImageEncoderConfig()
    fields: dict[str, Any] = {}
    if shape_of(weights, "patch_embedding.weight", 4)[0] == published.dim:
        # A file without the last layer, which nobody reads, would pass for a shallower tower.
        fields["num_layers"] = published.num_layers
    return _drop_last_layer(weights, fields, weights.files[0])


def open_diffusers_image_encoder(folder: Path) -> ImageEncoderParts:
    """Open the Diffusers layout's folder, a CLIPVisionModel of transformers.

    Raises:
        UsageError: it is another network.
        CorruptInputError: files or tensors are missing, damaged, or contradict each other.
    """
    config = ConfigFile(folder / "config.json")
    fields = diffusers_image_encoder_fields(config)
    weights = open_component("image_encoder", folder, "model", key_maps.IMAGE_ENCODER)
    return _drop_last_layer(weights, fields, config.path)


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


def _drop_last_layer(
    weights: ComponentWeights, fields: dict[str, Any], source: Path
) -> ImageEncoderParts:
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
