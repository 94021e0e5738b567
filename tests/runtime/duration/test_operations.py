"""Multiply-adds of the networks, against PyTorch's counter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from wanx.config.models import PRESETS
from wanx.models.dit.model import WanDiT
from wanx.models.image_encoder import ImageEncoder
from wanx.models.text_encoder import UMT5Encoder
from wanx.models.vae import WanVAE
from wanx.runtime.duration import operations


def counted(call: Callable[..., object], *arguments: torch.Tensor | None) -> float:
    ops = torch.ops.wanx
    counter = FlopCounterMode(
        display=False, custom_mapping={ops.attention: products, ops.biased_attention: products}
    )
    with torch.device("meta"), torch.no_grad(), counter:
        call(*arguments)
    return counter.get_total_flops() / 2


def products(queries: torch.Size, keys: torch.Size, *_: object, **__: object) -> int:
    """Of attention: scores, and the values that they weigh."""
    return 2 * 2 * queries.numel() * keys[1]


def on_meta(network: Callable[[Any], nn.Module], config: object) -> Any:
    """Make a network without memory, its constants neither."""
    with torch.device("meta"):
        return network(config).to("meta")


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, device="meta")


def total(found: operations.MultiplyAdds) -> float:
    return found.linears + found.others


@pytest.mark.parametrize("tokens", [24, 1001])
@pytest.mark.parametrize("name", [name for name in PRESETS if name != "t2v-14B"])
def test_denoisers(name: str, tokens: int) -> None:
    config = replace(PRESETS[name].dit, num_layers=6 if name.startswith("tiny") else 4)
    config = replace(config, vace_layers=config.vace_layers[:2])
    model = on_meta(WanDiT, config)
    half = config.head_dim // 2
    images = zeros(1, config.image_tokens * config.image_frames, config.image_dim or 1)
    control = zeros(1, tokens, config.vace_in_dim * config.patch_volume)
    expected = counted(
        model, zeros(1, tokens, config.token_dim), zeros(1),
        zeros(1, config.text_len, config.text_dim), zeros(tokens, half), zeros(tokens, half),
        images if config.image_dim else None,
        control if config.vace_layers else None,
        zeros(len(config.vace_layers)) if config.vace_layers else None,
    )  # fmt: skip
    assert total(operations.denoiser(config, tokens)) == expected


@pytest.mark.parametrize("name", ["tiny", "t2v-1.3B"])
def test_text_encoders(name: str) -> None:
    config = replace(PRESETS[name].text_encoder, num_layers=2)
    model = on_meta(UMT5Encoder, config)
    ids = torch.zeros(1, 77, dtype=torch.int64, device="meta")
    assert total(operations.text_encoder(config, 77)) == counted(model, ids)


@pytest.mark.parametrize("name", ["tiny-i2v", "i2v-14B"])
def test_image_encoders(name: str) -> None:
    config = PRESETS[name].image_encoder
    assert config is not None
    config = replace(config, num_layers=4)
    model = on_meta(ImageEncoder, config)
    pixels = zeros(1, 3, config.image_size, config.image_size)
    assert total(operations.image_encoder(config)) == counted(model, pixels)


@pytest.mark.parametrize("size", [(1, 16, 24), (5, 8, 8), (4, 10, 6)])
@pytest.mark.parametrize("name", ["tiny", "t2v-1.3B"])
def test_vaes(name: str, size: tuple[int, int, int]) -> None:
    config = PRESETS[name].vae
    model = on_meta(WanVAE, config)
    times, height, width = size
    frames = 1 + 4 * (times - 1)
    decoded = counted(model.decode, zeros(1, config.z_dim, *size))
    assert total(operations.vae_decoder(config, *size)) == decoded
    encoded = counted(model.encode, zeros(1, 3, frames, 8 * height, 8 * width))
    assert total(operations.vae_encoder(config, frames, height, width)) == encoded
