"""The text encoder against transformers' UMT5EncoderModel, with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.peers import (
    TEXT_ENCODER_SIZES,
    copy_weights,
    random_text_encoder,
    relative_error,
)
from wanx.checkpoints.key_maps import TEXT_ENCODER
from wanx.config.models import TextEncoderConfig
from wanx.models.text_encoder import UMT5Encoder, distance_buckets

SIZES: list[dict[str, Any]] = [
    {"relative_attention_max_distance": 50},
    # Buckets as published; distances 128…511 all fall into the last one.
    {"relative_attention_num_buckets": 32},
    {"num_heads": 1, "d_kv": 48, "d_ff": 7, "num_layers": 3},
]


def build_pair(**sizes: Any) -> tuple[UMT5Encoder, Any]:
    peer = random_text_encoder(**sizes)
    sizes = TEXT_ENCODER_SIZES | sizes
    config = TextEncoderConfig(
        vocab_size=sizes["vocab_size"],
        dim=sizes["d_model"],
        ffn_dim=sizes["d_ff"],
        num_heads=sizes["num_heads"],
        head_dim=sizes["d_kv"],
        num_layers=sizes["num_layers"],
        num_buckets=sizes["relative_attention_num_buckets"],
        max_distance=sizes.get("relative_attention_max_distance", 128),
    )
    ours = copy_weights(UMT5Encoder(config), peer, TEXT_ENCODER)
    assert isinstance(ours, UMT5Encoder)
    return ours, peer


def random_ids(length: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, TEXT_ENCODER_SIZES["vocab_size"], (batch, length), generator=generator)


@pytest.mark.parametrize("length", [1, 7, 64, 512])
@pytest.mark.parametrize("sizes", SIZES)
def test_features(sizes: dict[str, Any], length: int) -> None:
    ours, peer = build_pair(**sizes)
    ids = random_ids(length)
    expected = peer(ids).last_hidden_state
    assert relative_error(ours(ids), expected) <= 1e-5


@pytest.mark.parametrize("real", [1, 5, 31])
def test_leaving_padding_out_equals_masking_it(real: int) -> None:
    """The peers pad to a fixed length and mask; the runtime feeds the real tokens alone."""
    ours, peer = build_pair()
    ids = random_ids(32)
    mask = (torch.arange(32) < real).long()[None]
    expected = peer(ids, attention_mask=mask).last_hidden_state[:, :real]
    assert relative_error(ours(ids, mask)[:, :real], expected) <= 1e-5
    assert relative_error(ours(ids[:, :real]), expected) <= 1e-5


def test_a_batch_of_unequal_prompts() -> None:
    ours, peer = build_pair()
    ids = random_ids(9, batch=3)
    mask = (torch.arange(9) < torch.tensor([[9], [4], [1]])).long()
    expected = peer(ids, attention_mask=mask).last_hidden_state
    assert relative_error(ours(ids, mask)[mask > 0], expected[mask > 0]) <= 1e-5


def test_order_matters() -> None:
    """Only the position bias tells the encoder where a token stands."""
    ours, _ = build_pair()
    ids = random_ids(12)
    assert relative_error(ours(ids.flip(1)).flip(1), ours(ids)) > 1e-2


@pytest.mark.parametrize("max_distance", [20, 50, 128, 200])
@pytest.mark.parametrize("num_buckets", [8, 16, 32, 64])
def test_buckets(num_buckets: int, max_distance: int) -> None:
    """Every signed distance within reach of a prompt falls into transformers' bucket."""
    peer = random_text_encoder(
        relative_attention_num_buckets=num_buckets, relative_attention_max_distance=max_distance
    )
    attention = peer.encoder.block[0].layer[0].SelfAttention
    distance = torch.arange(-600, 601)
    half = num_buckets // 2
    table = distance_buckets(half, max_distance)
    ours = table[distance.abs().clamp_max(max_distance)] + (distance > 0) * half
    assert torch.equal(ours, attention._relative_position_bucket(distance))
