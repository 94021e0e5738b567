"""Small checkpoints in both layouts, as diffusers and transformers save them, and how they fail."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel, WanVACETransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from tests.support.peers import original_clip
from wanx.checkpoints.checkpoint import Checkpoint, open_checkpoint
from wanx.checkpoints.key_maps import DIT, TEXT_ENCODER, vae_key_map
from wanx.config.models import DiTConfig, ImageEncoderConfig, TextEncoderConfig, VAEConfig
from wanx.errors import WanxError

DIT_SIZES = {
    "num_attention_heads": 3,
    "attention_head_dim": 12,
    "text_dim": 24,
    "freq_dim": 14,
    "ffn_dim": 50,
    "num_layers": 3,
}
OUR_DIT = DiTConfig(dim=36, ffn_dim=50, num_heads=3, num_layers=3, freq_dim=14, text_dim=24)
IMAGE = {"in_channels": 36, "image_dim": 32, "added_kv_proj_dim": 36}
OUR_IMAGE: dict[str, Any] = {"in_dim": 36, "image_dim": 32, "image_tokens": 5}
TASKS: dict[str, tuple[type, dict[str, Any], DiTConfig]] = {
    "t2v": (WanTransformer3DModel, {}, OUR_DIT),
    "i2v": (WanTransformer3DModel, IMAGE, dataclasses.replace(OUR_DIT, **OUR_IMAGE)),
    "flf2v": (
        WanTransformer3DModel,
        IMAGE | {"pos_embed_seq_len": 10},
        dataclasses.replace(OUR_DIT, **OUR_IMAGE, image_frames=2),
    ),
    "vace": (
        WanVACETransformer3DModel,
        {"vace_layers": [0, 2], "vace_in_channels": 40},
        dataclasses.replace(OUR_DIT, vace_layers=(0, 2), vace_in_dim=40),
    ),
}
OUR_T5 = TextEncoderConfig(
    vocab_size=50, dim=24, ffn_dim=30, num_heads=4, head_dim=6, num_layers=2, num_buckets=16
)
OUR_CLIP = ImageEncoderConfig(dim=32, ffn_dim=50, num_layers=3, image_size=28)
CLIP_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14"
OUR_VAE = VAEConfig(
    base_dim=4, multipliers=(1, 3, 2), num_res_blocks=1, temporal_downsample=(True, False)
)


def write_diffusers(folder: Path, task: str, shard: str = "10GB") -> Path:
    build, changes, _ = TASKS[task]
    torch.manual_seed(0)
    build(**DIT_SIZES, **changes).save_pretrained(folder / "transformer", max_shard_size=shard)
    t5 = UMT5Config(
        vocab_size=50, d_model=24, d_kv=6, d_ff=30, num_layers=2, num_heads=4,
        relative_attention_num_buckets=16,
    )  # fmt: skip
    UMT5EncoderModel(t5).save_pretrained(folder / "text_encoder", max_shard_size=shard)
    if task in ("i2v", "flf2v"):
        clip = CLIPVisionConfig(
            hidden_size=32, intermediate_size=50, num_hidden_layers=3, num_attention_heads=16,
            image_size=28, patch_size=14, hidden_act="gelu",
        )  # fmt: skip
        CLIPVisionModel(clip).save_pretrained(folder / "image_encoder", max_shard_size=shard)
    AutoencoderKLWan(
        base_dim=4, dim_mult=[1, 3, 2], num_res_blocks=1, temperal_downsample=[True, False]
    ).save_pretrained(folder / "vae", max_shard_size=shard)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text('{"model": {}}')
    index = {"_class_name": "WanPipeline", "transformer_2": [None, None], "expand_timesteps": False}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_original(folder: Path, diffusers: Path, task: str, suffix: str = "pth") -> Path:
    """The same tensors in the original layout."""
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    (folder / "google" / "umt5-xxl" / "tokenizer.json").write_text('{"model": {}}')
    for part, stem, key_map, name in (
        ("transformer", "diffusion_pytorch_model", DIT, "diffusion_pytorch_model.safetensors"),
        ("text_encoder", "model", TEXT_ENCODER, f"models_t5_umt5-xxl-enc-bf16.{suffix}"),
        ("vae", "diffusion_pytorch_model", vae_key_map(3, 1), f"Wan2.1_VAE.{suffix}"),
    ):
        theirs = load_file(diffusers / part / f"{stem}.safetensors")
        state = {str(key_map.to_original(key)): tensor for key, tensor in theirs.items()}
        save = save_file if name.endswith("safetensors") else torch.save
        save(state, folder / name)
    if task in ("i2v", "flf2v"):
        theirs = load_file(diffusers / "image_encoder" / "model.safetensors")
        save = save_file if suffix == "safetensors" else torch.save
        save(original_clip(theirs), folder / f"{CLIP_FILE}.{suffix}")
    config = TASKS[task][2]
    fields = ("dim", "ffn_dim", "freq_dim", "in_dim", "num_heads", "num_layers", "out_dim", "eps")
    values = {key: getattr(config, key) for key in fields}
    values |= {"_class_name": "WanModel", "model_type": task, "text_len": 512}
    if task == "vace":
        values |= {"vace_layers": list(config.vace_layers), "vace_in_dim": config.vace_in_dim}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def tensor_bytes(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {
        f"{component}.{name}": b"".join(bytes(piece) for piece in source.iter_bytes())
        for component, weights in checkpoint.components.items()
        for name, source in weights.tensors.items()
    }


def edit_json(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def assert_refused(error: type[WanxError], folder: Path, *words: str, **options: Any) -> None:
    with pytest.raises(error) as caught:
        open_checkpoint(folder, **options)
    message = str(caught.value)
    assert type(caught.value) is error
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert len(message) < 800


def write_sparse(path: Path, shapes: dict[str, list[int]]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(torch.Size(shape).numel())
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
