"""A pipeline of diffusers as the original checkpoint, and what a bundle of it stores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.peers import original_clip
from wanx.bundle.reader import Bundle
from wanx.checkpoints.key_maps import DIT, TEXT_ENCODER, TIED, KeyMap, vae_key_map

DIT_STEM = "diffusion_pytorch_model"


def with_original_names(
    module: torch.nn.Module, key_map: KeyMap, tied: dict[str, str]
) -> dict[str, Tensor]:
    """The weights of a peer under their original names."""
    weights = {}
    for name, tensor in module.state_dict().items():
        if name not in tied:
            original = key_map.to_original(name)
            assert original is not None, name
            weights[original] = tensor.contiguous()
    return weights


def write_original(peer: Any, folder: Path, task: str = "t2v", suffix: str = "pth") -> Path:
    """The layout that Wan2.1 was published in, with a sharded transformer."""
    folder.mkdir()
    save = torch.save if suffix == "pth" else save_file
    dit = peer.transformer.config
    heads = dit.num_attention_heads
    config = {
        "_class_name": "VaceWanModel" if task == "vace" else "WanModel",
        "model_type": task,
        "dim": heads * dit.attention_head_dim,
        "num_heads": heads,
        "in_dim": dit.in_channels,
        "out_dim": dit.out_channels,
        "text_len": 512,
        **{key: dit[key] for key in ("ffn_dim", "freq_dim", "num_layers", "eps")},
    }
    if task == "vace":
        config |= {"vace_layers": dit.vace_layers, "vace_in_dim": dit.vace_in_channels}
    (folder / "config.json").write_text(json.dumps(config))
    weights = with_original_names(peer.transformer, DIT, {})
    names = sorted(weights)
    index: dict[str, Any] = {"metadata": {}, "weight_map": {}}
    for number in range(3):
        shard = f"{DIT_STEM}-{number + 1:05d}-of-00003.safetensors"
        part = {name: weights[name] for name in names[number::3]}
        save_file(part, folder / shard)
        index["weight_map"] |= dict.fromkeys(part, shard)
    (folder / f"{DIT_STEM}.safetensors.index.json").write_text(json.dumps(index))
    text_encoder = with_original_names(peer.text_encoder, TEXT_ENCODER, TIED["text_encoder"])
    save(text_encoder, folder / f"models_t5_umt5-xxl-enc-bf16.{suffix}")
    vae = peer.vae.config
    vae_map = vae_key_map(len(vae.dim_mult), vae.num_res_blocks)
    save(with_original_names(peer.vae, vae_map, {}), folder / f"Wan2.1_VAE.{suffix}")
    if task in ("i2v", "flf2v"):
        clip = original_clip(peer.image_encoder.state_dict())
        save(clip, folder / f"models_clip_open-clip-xlm-roberta-large-vit-huge-14.{suffix}")
    tokenizer = folder / "google" / "umt5-xxl" / "tokenizer.json"
    tokenizer.parent.mkdir(parents=True)
    tokenizer.write_text(peer.tokenizer.backend_tokenizer.to_str())
    return folder


def stored_tensors(bundle: Bundle) -> dict[str, Tensor]:
    """Every tensor of a bundle, by its group and name."""
    return {
        f"{path.stem.split('-')[0]}/{name}": tensor
        for path in sorted((bundle.root / "weights").iterdir())
        for name, tensor in load_file(path).items()
    }


def assert_same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        # The patch embedding is a convolution's bytes, whatever shape they are given.
        assert torch.equal(a[name].flatten(), b[name].flatten()), name


def graph_files(bundle: Bundle) -> dict[str, Any]:
    return {path: record for path, record in bundle.manifest.files.items() if ".onnx" in path}
