"""Sizes of the networks, from a checkpoint's config files and from its tensors' shapes.

What both tell must agree; what only one tells is taken from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from wanx.checkpoints.config_file import ConfigFile
from wanx.checkpoints.inferred_sizes import count_blocks, require_agreement, shape_of
from wanx.checkpoints.weights import ComponentWeights
from wanx.config.models import DiTConfig, Task, TextEncoderConfig, VAEConfig
from wanx.errors import CorruptInputError, UsageError


def infer_task(names: Iterable[str]) -> Task:
    """Infer the task of a DiT from its original tensor names."""
    names = list(names)
    if any(name.startswith("vace_blocks.") for name in names):
        return "vace"
    if "img_emb.emb_pos" in names:
        return "flf2v"
    return "i2v" if any(".cross_attn.k_img." in name for name in names) else "t2v"


def original_dit_fields(config: ConfigFile) -> dict[str, Any]:
    """Fields of :class:`DiTConfig` in the config.json of the original layout."""
    config.require("_class_name", "WanModel", "VaceWanModel")
    config.require("model_type", "t2v", "i2v", "flf2v", "vace")
    config.require("patch_size", [1, 2, 2])
    config.require("window_size", [-1, -1])
    config.require("qk_norm", True)
    config.require("cross_attn_norm", True)
    fields: dict[str, Any] = {"num_heads": config.size("num_heads")}
    sizes = (
        "dim",
        "ffn_dim",
        "num_layers",
        "in_dim",
        "out_dim",
        "freq_dim",
        "text_dim",
        "text_len",
    )
    fields |= {key: config.size(key) for key in (*sizes, "vace_in_dim") if key in config.values}
    if "eps" in config.values:
        fields["eps"] = config.epsilon("eps")
    if config.values.get("vace_layers") is not None:
        fields["vace_layers"] = config.sizes("vace_layers", minimum=0)
    return fields


def diffusers_dit_fields(config: ConfigFile) -> dict[str, Any]:
    """Fields of :class:`DiTConfig` in transformer/config.json of the Diffusers layout."""
    config.require("_class_name", "WanTransformer3DModel", "WanVACETransformer3DModel")
    config.require("patch_size", [1, 2, 2])
    config.require("cross_attn_norm", True)
    config.require("qk_norm", "rms_norm_across_heads")
    num_heads = config.size("num_attention_heads")
    dim = num_heads * config.size("attention_head_dim")
    config.require("added_kv_proj_dim", None, dim)
    fields: dict[str, Any] = {"num_heads": num_heads, "dim": dim, "eps": config.epsilon("eps")}
    for key, field in {
        "ffn_dim": "ffn_dim",
        "num_layers": "num_layers",
        "in_channels": "in_dim",
        "out_channels": "out_dim",
        "freq_dim": "freq_dim",
        "text_dim": "text_dim",
        "image_dim": "image_dim",
        "vace_in_channels": "vace_in_dim",
    }.items():
        if config.values.get(key) is not None:
            fields[field] = config.size(key)
    if config.values.get("vace_layers") is not None:
        fields["vace_layers"] = config.sizes("vace_layers", minimum=0)
    if config.values.get("pos_embed_seq_len") is not None:
        fields["image_positions"] = config.size("pos_embed_seq_len")
    return fields


def dit_config(fields: dict[str, Any], weights: ComponentWeights, config_path: Path) -> DiTConfig:
    """Join the fields of a config file with what the tensors tell.

    Args:
        fields: what a config file says.
        weights: the tensors.
        config_path: the config file, for messages.

    Raises:
        CorruptInputError: the two disagree, or tensors that tell sizes are missing.
        UsageError: the network is not one of Wan2.1.
    """
    task = infer_task(weights.tensors)
    inferred = sizes_told_by_tensors(weights)
    if task == "vace":
        hints = count_blocks(weights, "vace_blocks")
        # the reference's default: every second block
        layers = fields.setdefault("vace_layers", tuple(range(0, inferred["num_layers"], 2)))
        if (
            len(layers) != hints
            or layers != tuple(sorted({0, *layers}))
            or layers[-1] >= inferred["num_layers"]
        ):
            raise CorruptInputError(
                f"{config_path}: vace_layers {list(layers)} do not fit {hints} hint blocks beside "
                f"{inferred['num_layers']} blocks; the config and the weights are of different "
                "models"
            )
    else:
        fields = {k: v for k, v in fields.items() if k not in ("vace_layers", "vace_in_dim")}
    require_agreement(fields, inferred, config_path)
    return _checked_dit(task, {**fields, **inferred}, config_path)


def sizes_told_by_tensors(weights: ComponentWeights) -> dict[str, int]:
    """Sizes of a DiT that its tensors tell.

    Raises:
        CorruptInputError: tensors that tell sizes are missing.
        UsageError: the patches are not those of Wan2.1.
    """
    task = infer_task(weights.tensors)
    dim, in_dim, *patch = shape_of(weights, "patch_embedding.weight", 5)
    if patch != [1, 2, 2]:
        raise UsageError(
            f"{weights.files[0]}: the patch size {patch} is not supported, only [1, 2, 2]"
        )
    told = {
        "dim": dim,
        "in_dim": in_dim,
        "out_dim": shape_of(weights, "head.head.weight", 2)[0] // math.prod(patch),
        "ffn_dim": shape_of(weights, "blocks.0.ffn.0.weight", 2)[0],
        "freq_dim": shape_of(weights, "time_embedding.0.weight", 2)[1],
        "text_dim": shape_of(weights, "text_embedding.0.weight", 2)[1],
        "num_layers": count_blocks(weights, "blocks"),
    }
    if task in ("i2v", "flf2v"):
        told["image_dim"] = shape_of(weights, "img_emb.proj.1.weight", 2)[1]
    if task == "flf2v":
        told["image_positions"] = shape_of(weights, "img_emb.emb_pos", 3)[1]
    if task == "vace":
        told["vace_in_dim"] = shape_of(weights, "vace_patch_embedding.weight", 5)[1]
    return told


def _checked_dit(task: Task, fields: dict[str, Any], config_path: Path) -> DiTConfig:
    if positions := fields.pop("image_positions", None):
        fields |= {"image_frames": 2, "image_tokens": positions // 2}
    config = DiTConfig(**fields)
    with_image = config.image_dim is not None
    in_dim = 2 * config.out_dim + 4 if with_image else config.out_dim
    if config.in_dim != in_dim:
        raise UsageError(
            f"{config_path}: {config.in_dim} input channels for task {task} are not supported, "
            f"only {in_dim}; use a Wan2.1 checkpoint (not Wan2.2 or a variant with more inputs)"
        )
    if config.dim % config.num_heads or config.head_dim % 2:
        raise CorruptInputError(
            f"{config_path}: {config.num_heads} heads do not divide the width {config.dim} evenly; "
            "the config and the weights are of different models"
        )
    return config


def diffusers_text_encoder_fields(config: ConfigFile) -> dict[str, Any]:
    """Fields of :class:`TextEncoderConfig` in text_encoder/config.json."""
    config.require("model_type", "umt5")
    config.require("feed_forward_proj", "gated-gelu")
    config.require("dense_act_fn", "gelu_new")
    return {
        "vocab_size": config.size("vocab_size"),
        "dim": config.size("d_model"),
        "ffn_dim": config.size("d_ff"),
        "num_heads": config.size("num_heads"),
        "head_dim": config.size("d_kv"),
        "num_layers": config.size("num_layers"),
        "num_buckets": config.size("relative_attention_num_buckets"),
        "max_distance": config.size("relative_attention_max_distance"),
        "eps": config.epsilon("layer_norm_epsilon"),
    }


def text_encoder_config(
    fields: dict[str, Any], weights: ComponentWeights, source: Path
) -> TextEncoderConfig:
    """Join the fields of a config file, if any, with what the tensors tell.

    Raises:
        CorruptInputError: the two disagree, or tensors that tell sizes are missing.
    """
    vocab_size, dim = shape_of(weights, "token_embedding.weight", 2)
    num_buckets, num_heads = shape_of(weights, "blocks.0.pos_embedding.embedding.weight", 2)
    inferred = {
        "vocab_size": vocab_size,
        "dim": dim,
        "ffn_dim": shape_of(weights, "blocks.0.ffn.fc1.weight", 2)[0],
        "num_heads": num_heads,
        "head_dim": shape_of(weights, "blocks.0.attn.q.weight", 2)[0] // num_heads,
        "num_layers": count_blocks(weights, "blocks"),
        "num_buckets": num_buckets,
    }
    require_agreement(fields, inferred, source)
    return TextEncoderConfig(**{**fields, **inferred})


def diffusers_vae_fields(config: ConfigFile) -> dict[str, Any]:
    """Fields of :class:`VAEConfig` in vae/config.json."""
    config.require("_class_name", "AutoencoderKLWan")
    config.require("is_residual", False)
    config.require("patch_size", None)
    config.require("attn_scales", [])
    config.require("in_channels", 3)
    config.require("out_channels", 3)
    base_dim = config.size("base_dim")
    config.require("decoder_base_dim", None, base_dim)
    fields: dict[str, Any] = {
        "base_dim": base_dim,
        "z_dim": config.size("z_dim"),
        "multipliers": config.sizes("dim_mult"),
        "num_res_blocks": config.size("num_res_blocks"),
        "temporal_downsample": config.flags("temperal_downsample"),
    }
    for key, field in {"latents_mean": "latent_mean", "latents_std": "latent_std"}.items():
        if key in config.values:
            fields[field] = config.numbers(key)
    return fields


def vae_config(fields: dict[str, Any], weights: ComponentWeights, source: Path) -> VAEConfig:
    """Join the fields of a config file, if any, with what the tensors tell.

    Raises:
        CorruptInputError: the two disagree, or tensors that tell sizes are missing.
        UsageError: the statistics of the latents are not known.
    """
    base_dim = shape_of(weights, "encoder.conv1.weight", 5)[0]
    multipliers, temporal, blocks, width = [], [], [0], base_dim
    for i in range(count_blocks(weights, "encoder.downsamples")):
        layer = f"encoder.downsamples.{i}"
        if f"{layer}.resample.1.weight" in weights.tensors:
            multipliers.append(width // base_dim)
            temporal.append(f"{layer}.time_conv.weight" in weights.tensors)
            blocks.append(0)
        else:
            width = shape_of(weights, f"{layer}.residual.2.weight", 5)[0]
            blocks[-1] += 1
    inferred: dict[str, Any] = {
        "base_dim": base_dim,
        "z_dim": shape_of(weights, "conv2.weight", 5)[0],
        "multipliers": (*multipliers, width // base_dim),
        "num_res_blocks": blocks[0],
        "temporal_downsample": tuple(temporal),
    }
    require_agreement(fields, inferred, source)
    config = VAEConfig(**{**fields, **inferred})
    if not len(config.latent_mean) == len(config.latent_std) == config.z_dim:
        raise UsageError(
            f"{source}: means and deviations of {len(config.latent_mean)} latent channels do not "
            f"fit the VAE's {config.z_dim}; give them in the config.json of the Diffusers layout"
        )
    if min(config.latent_std) <= 0:
        raise CorruptInputError(
            f"{source}: latents_std holds {min(config.latent_std)}, which is not positive; "
            "download the file again"
        )
    return config
