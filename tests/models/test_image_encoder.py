"""The image encoder against transformers' CLIPVisionModel, with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests.support.peers import (
    IMAGE_ENCODER_SIZES,
    image_features,
    random_image_encoder,
    relative_error,
)
from wanx.checkpoints.key_maps import IMAGE_ENCODER
from wanx.config.models import PRESETS, ImageEncoderConfig
from wanx.models.image_encoder import ImageEncoder

SIZES: list[dict[str, Any]] = [
    {},
    {"num_attention_heads": 3, "patch_size": 7, "image_size": 35},
    # Heads as wide as published, and two layers, of which one runs.
    {"hidden_size": 80, "num_attention_heads": 1, "num_hidden_layers": 2},
    {"hidden_size": 20, "num_attention_heads": 5, "intermediate_size": 3, "image_size": 14},
    {"num_hidden_layers": 6, "layer_norm_eps": 1e-2},
]


def build_pair(**sizes: Any) -> tuple[ImageEncoder, Any]:
    """Our network and transformers', with equal weights."""
    peer = random_image_encoder(**sizes)
    sizes = IMAGE_ENCODER_SIZES | sizes
    config = ImageEncoderConfig(
        dim=sizes["hidden_size"],
        ffn_dim=sizes["intermediate_size"],
        num_heads=sizes["num_attention_heads"],
        num_layers=sizes["num_hidden_layers"],
        patch_size=sizes["patch_size"],
        image_size=sizes["image_size"],
        eps=sizes.get("layer_norm_eps", 1e-5),
    )
    ours = ImageEncoder(config)
    state = peer.state_dict()

    def theirs(name: str) -> Tensor:
        if ".to_qkv." in name:
            return torch.cat([theirs(name.replace("to_qkv", f"to_{part}")) for part in "qkv"])
        found = IMAGE_ENCODER.to_diffusers(name)
        assert found is not None, name
        return state[found]

    weights = {name: theirs(name).reshape(p.shape) for name, p in ours.named_parameters()}
    ours.load_state_dict(weights)
    return ours.eval().requires_grad_(False), peer


def random_pixels(size: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize("sizes", SIZES)
def test_features(sizes: dict[str, Any]) -> None:
    ours, peer = build_pair(**sizes)
    pixels = random_pixels(peer.config.image_size, batch=2)
    expected = image_features(peer, pixels)
    assert expected.shape[1] == len(ours.pos_embedding[0])
    assert relative_error(ours(pixels), expected) <= 1e-5


def test_the_order_of_patches_matters() -> None:
    ours, _ = build_pair()
    pixels = random_pixels(28)
    assert relative_error(ours(pixels.transpose(2, 3)), ours(pixels)) > 1e-2


def test_published_size() -> None:
    """ViT-H/14: 257 tokens of 1280 features, and 32 layers, of which 31 are built."""
    config = PRESETS["i2v-14B"].image_encoder
    assert config == PRESETS["flf2v-14B"].image_encoder
    assert config is not None
    assert (config.tokens, config.dim) == (257, 1280)
    with torch.device("meta"):
        ours = ImageEncoder(config)
        theirs = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=1280,
                intermediate_size=5120,
                num_attention_heads=16,
                num_hidden_layers=32,
                patch_size=14,
                image_size=224,
            )
        )
    unread = ("encoder.layers.31.", "post_layernorm.")
    read = [p.numel() for name, p in theirs.named_parameters() if not name.startswith(unread)]
    assert sum(p.numel() for p in ours.parameters()) == sum(read)
    assert len(ours.transformer) == 31


def test_every_weight_matters() -> None:
    ours, _ = build_pair(num_hidden_layers=2)
    pixels = random_pixels(28)
    before = ours(pixels)
    for name, parameter in ours.named_parameters():
        kept = parameter.clone()
        parameter.add_(torch.randn_like(parameter) * 0.1)
        assert relative_error(ours(pixels), before) > 1e-5, name
        parameter.copy_(kept)
