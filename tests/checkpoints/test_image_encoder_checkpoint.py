"""CLIP in a checkpoint: what of it is read, and what does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests.support.checkpoints import (
    CLIP_FILE,
    assert_refused,
    edit_json,
    tensor_bytes,
    write_diffusers,
    write_original,
    write_sparse,
)
from wanx.checkpoints.checkpoint import open_checkpoint
from wanx.config.models import ImageEncoderConfig
from wanx.errors import CorruptInputError, UsageError, WanxError
from wanx.models.image_encoder import ImageEncoder


def image_checkpoint(tmp_path: Path, layout: str, task: str = "i2v") -> Path:
    folder = write_diffusers(tmp_path / "diffusers", task)
    if layout == "original":
        folder = write_original(tmp_path / "original", folder, task, "safetensors")
    return folder


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_missing_image_encoder_is_named(tmp_path: Path) -> None:
    diffusers = image_checkpoint(tmp_path, "diffusers")
    original = write_original(tmp_path / "original", diffusers, "i2v")
    (original / f"{CLIP_FILE}.pth").unlink()
    assert_refused(CorruptInputError, original, "original lacks", f"{CLIP_FILE}.pth or", "download")
    (diffusers / "image_encoder" / "model.safetensors").unlink()
    assert_refused(CorruptInputError, diffusers, "image_encoder holds neither", "download")
    shutil.rmtree(diffusers / "image_encoder")
    assert_refused(
        CorruptInputError, diffusers, "diffusers lacks image_encoder/config.json", "download"
    )


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_names_of_older_transformers(prefix: str, shards: int, tmp_path: Path) -> None:
    """transformers 5 saves bare names; the published checkpoints have a prefix and a table."""
    folder = image_checkpoint(tmp_path, "diffusers")
    expected = tensor_bytes(open_checkpoint(folder))
    image_encoder = folder / "image_encoder"
    (path,) = image_encoder.glob("*.safetensors")
    tensors = {f"{prefix}{name}": tensor for name, tensor in load_file(path).items()}
    tensors[f"{prefix}embeddings.position_ids"] = torch.arange(5)[None]
    if shards == 1:
        save_file(tensors, path)
    else:  # q, k and v in different files
        path.unlink()
        index = {}
        for number, names in enumerate((sorted(tensors)[i::3] for i in range(3)), 1):
            file = f"model-{number:05d}-of-00003.safetensors"
            save_file({name: tensors[name] for name in names}, image_encoder / file)
            index |= dict.fromkeys(names, file)
        text = json.dumps({"metadata": {}, "weight_map": index})
        (image_encoder / "model.safetensors.index.json").write_text(text)
    checkpoint = open_checkpoint(folder)
    assert tensor_bytes(checkpoint) == expected
    weights = checkpoint.components["image_encoder"]
    assert weights.stored_name("pre_norm.bias") == f"{prefix}pre_layrnorm.bias"
    files = weights.tensors["transformer.0.attn.to_qkv.weight"].files
    assert len(files) == (1 if shards == 1 else 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: [t.pop(f"encoder.layers.1.self_attn.{x}_proj.bias") for x in "kv"],
            "lack encoder.layers.1.self_attn.k_proj.bias, encoder.layers.1.self_attn.v_proj.bias",
        ),
        (
            lambda t: t.update({"encoder.layers.0.self_attn.v_proj.bias": torch.ones(32).half()}),
            "q_proj.bias + encoder.layers.0.self_attn.k_proj.bias + encoder.layers.0.self_attn.v",
        ),
        (lambda t: t.pop("embeddings.patch_embedding.weight"), "lack embeddings.patch_embedding"),
        (lambda t: t.pop("embeddings.position_embedding.weight"), "lack embeddings.position_emb"),
        (
            lambda t: t.update({"embeddings.position_embedding.weight": torch.ones(6, 32)}),
            "6 positions",
        ),
        (
            lambda t: t.update({"embeddings.position_embedding.weight": torch.ones(5)}),
            "3 positive sides",
        ),
        (
            lambda t: [t.pop(name) for name in list(t) if ".layers.2." in name],
            "num_layers 3 but the tensors have num_layers 2",
        ),
    ],
)
def test_image_encoder_tensors_that_do_not_fit(
    change: Callable[[dict[str, torch.Tensor]], object], words: str, tmp_path: Path
) -> None:
    folder = image_checkpoint(tmp_path, "diffusers")
    edit_tensors(folder / "image_encoder" / "model.safetensors", change)
    assert_refused(CorruptInputError, folder, words)


@pytest.mark.parametrize(
    ("error", "changes", "words"),
    [
        (UsageError, {"hidden_act": "quick_gelu"}, "hidden_act = 'quick_gelu'"),
        (UsageError, {"hidden_act": ...}, "hidden_act = 'quick_gelu'"),
        (UsageError, {"num_channels": 4}, "num_channels = 4"),
        (UsageError, {"model_type": "siglip_vision_model"}, "model_type"),
        (CorruptInputError, {"hidden_size": 48}, "dim 48 but the tensors have dim 32"),
        (CorruptInputError, {"intermediate_size": 51}, "ffn_dim 51"),
        (CorruptInputError, {"num_hidden_layers": 4}, "num_layers 4"),
        (CorruptInputError, {"num_attention_heads": 5}, "5 heads"),
        (CorruptInputError, {"num_attention_heads": "16"}, "num_attention_heads = '16'"),
        (CorruptInputError, {"image_size": 42}, "image_size 42"),
        (CorruptInputError, {"patch_size": 7}, "patch_size 7"),
        (CorruptInputError, {"layer_norm_eps": 0}, "layer_norm_eps = 0"),
    ],
)
def test_image_encoder_configs(
    error: type[WanxError], changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = image_checkpoint(tmp_path, "diffusers")
    edit_json(folder / "image_encoder" / "config.json", **changes)
    assert_refused(error, folder, "image_encoder/config.json", words)


def test_a_published_image_encoder_without_its_last_layer(tmp_path: Path) -> None:
    """It is never read, but a file that lacks it would pass for a tower of 31 layers."""
    folder = image_checkpoint(tmp_path, "original")
    with torch.device("meta"):
        tower = ImageEncoder(ImageEncoderConfig())
    shapes = {f"visual.{name}": list(p.shape) for name, p in tower.named_parameters()}
    write_sparse(folder / f"{CLIP_FILE}.safetensors", shapes)
    assert_refused(CorruptInputError, folder, "num_layers 32 but the tensors have num_layers 31")


@pytest.mark.parametrize(("task", "words"), [("i2v", "32 image features"), ("flf2v", "5 tokens")])
def test_image_encoder_of_another_model(task: str, words: str, tmp_path: Path) -> None:
    folder = image_checkpoint(tmp_path, "diffusers", task)
    sizes = {"hidden_size": 48} if task == "i2v" else {"hidden_size": 32, "image_size": 42}
    config = CLIPVisionConfig(
        intermediate_size=50, num_hidden_layers=3, num_attention_heads=16,
        **{"image_size": 28, "patch_size": 14, "hidden_act": "gelu"} | sizes,
    )  # fmt: skip
    CLIPVisionModel(config).save_pretrained(folder / "image_encoder")
    assert_refused(CorruptInputError, folder, words, "of different models")
