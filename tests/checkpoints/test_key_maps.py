"""The key maps against the networks of diffusers and transformers, and diffusers' converters."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel, WanVACETransformer3DModel
from diffusers.loaders.single_file_utils import (
    convert_wan_transformer_to_diffusers,
    convert_wan_vae_to_diffusers,
)
from torch import nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from wanx.checkpoints.key_maps import (
    CONCATENATED,
    DIT,
    IGNORED,
    IMAGE_ENCODER,
    LEADING_AXES,
    TEXT_ENCODER,
    TIED,
    KeyMap,
    vae_key_map,
)
from wanx.config.models import DiTConfig, ImageEncoderConfig, TextEncoderConfig, VAEConfig
from wanx.models.dit.model import WanDiT
from wanx.models.image_encoder import ImageEncoder
from wanx.models.text_encoder import UMT5Encoder
from wanx.models.vae import WanVAE

DIT_SIZES = {"num_attention_heads": 3, "attention_head_dim": 12, "ffn_dim": 50, "num_layers": 3}
LARGE = {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40}
SMALL = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}
I2V = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
SMALL_I2V = {"in_channels": 36, "image_dim": 20, "added_kv_proj_dim": 36}


def names_of(build: Callable[..., nn.Module], **sizes: Any) -> set[str]:
    with torch.device("meta"):
        return set(build(**sizes).state_dict())


def originals_of(key_map: KeyMap, theirs: set[str]) -> dict[str, str]:
    """Original names of all of a peer's tensors; each has one, and the way back is the identity."""
    renamed = {name: key_map.to_original(name) for name in theirs}
    assert None not in renamed.values(), sorted(n for n, o in renamed.items() if o is None)
    originals = {original: name for name, original in renamed.items() if original}
    assert len(originals) == len(theirs)
    assert all(key_map.to_diffusers(original) == name for original, name in originals.items())
    return originals


def unused_pairs(key_map: KeyMap, names: Iterable[str]) -> set[str]:
    """Original templates of the map that rename none of the names."""
    stems = {name.rsplit(".", 1)[0] for name in names} | set(names)
    return {t for t in key_map._to_diffusers if not any(matches(t, stem) for stem in stems)}


def matches(template: str, stem: str) -> bool:
    wanted, parts = template.split("."), stem.split(".")
    return len(wanted) == len(parts) and all(
        w == p or (w == "{n}" and p.isdigit()) for w, p in zip(wanted, parts, strict=True)
    )


@pytest.mark.parametrize(
    ("build", "sizes", "count"),
    [
        (WanTransformer3DModel, DIT_SIZES, 15 + 3 * 27),
        (WanTransformer3DModel, SMALL, 825),
        (WanTransformer3DModel, LARGE, 1095),
        (WanTransformer3DModel, LARGE | I2V, 1303),
        (WanTransformer3DModel, LARGE | I2V | {"pos_embed_seq_len": 514}, 1304),
        (WanVACETransformer3DModel, DIT_SIZES | {"vace_layers": [0, 2]}, 15 + 3 * 27 + 4 + 2 * 29),
        (WanVACETransformer3DModel, SMALL | {"vace_layers": list(range(0, 30, 2))}, 1264),
        (WanVACETransformer3DModel, LARGE, 1331),
    ],
    ids=["odd", "t2v-1.3B", "t2v-14B", "i2v", "flf2v", "odd vace", "vace-1.3B", "vace-14B"],
)
def test_dit_names(build: Callable[..., nn.Module], sizes: dict[str, Any], count: int) -> None:
    theirs = names_of(build, **sizes)
    originals = originals_of(DIT, theirs)
    assert len(originals) == count  # as the published checkpoints have
    emb_pos = originals.pop("img_emb.emb_pos", None)  # their converter for single files lacks it
    assert emb_pos in (None, "condition_embedder.image_embedder.pos_embed")
    converted = convert_wan_transformer_to_diffusers(dict(originals))
    assert converted == {name: name for name in theirs - {emb_pos}}


def test_dit_pairs_are_all_used() -> None:
    flf2v = names_of(WanTransformer3DModel, **DIT_SIZES, **SMALL_I2V, pos_embed_seq_len=10)
    vace = names_of(
        WanVACETransformer3DModel, **DIT_SIZES, image_dim=20, added_kv_proj_dim=36, vace_layers=[0]
    )
    assert unused_pairs(DIT, originals_of(DIT, flf2v | vace)) == set()


@pytest.mark.parametrize(
    ("build", "changes", "extra"),
    [
        (WanTransformer3DModel, {}, {}),
        (WanTransformer3DModel, SMALL_I2V, {"image_dim": 20, "in_dim": 36}),
        (
            WanTransformer3DModel,
            SMALL_I2V | {"pos_embed_seq_len": 10},
            {"image_dim": 20, "in_dim": 36, "image_frames": 2, "image_tokens": 5},
        ),
        (WanVACETransformer3DModel, {"vace_layers": [0, 2]}, {"vace_layers": (0, 2)}),
    ],
    ids=["t2v", "i2v", "flf2v", "vace"],
)
def test_dit_names_and_shapes_are_those_of_our_network(
    build: Callable[..., nn.Module], changes: dict[str, Any], extra: dict[str, Any]
) -> None:
    config = DiTConfig(dim=36, ffn_dim=50, num_heads=3, num_layers=3, **extra)
    with torch.device("meta"):
        theirs = build(**DIT_SIZES, **changes).state_dict()
        ours = {name: tuple(p.shape) for name, p in WanDiT(config).named_parameters()}
    originals = originals_of(DIT, set(theirs))
    assert set(originals) == set(ours)
    for original, name in originals.items():
        shape = tuple(theirs[name].shape)
        if original in ("patch_embedding.weight", "vace_patch_embedding.weight"):
            shape = (shape[0], math.prod(shape[1:]))
        assert shape == ours[original]


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"dim_mult": [1, 3], "temperal_downsample": [True], "num_res_blocks": 1},
        {"dim_mult": [1, 2, 2, 4, 4], "temperal_downsample": [False, True, True, False]},
        {"dim_mult": [2, 1, 3], "temperal_downsample": [True, False], "num_res_blocks": 3},
    ],
    ids=["published", "two stages", "five stages", "three blocks"],
)
def test_vae_names(sizes: dict[str, Any]) -> None:
    multipliers, blocks = sizes.get("dim_mult", [1, 2, 4, 4]), sizes.get("num_res_blocks", 2)
    key_map = vae_key_map(len(multipliers), blocks)
    with torch.device("meta"):
        theirs = AutoencoderKLWan(base_dim=6, **sizes).state_dict()
        ours = WanVAE(
            VAEConfig(
                base_dim=6,
                multipliers=tuple(multipliers),
                num_res_blocks=blocks,
                temporal_downsample=tuple(sizes.get("temperal_downsample", [False, True, True])),
            )
        )
    originals = originals_of(key_map, set(theirs))
    assert {o: tuple(theirs[n].shape) for o, n in originals.items()} == {
        name: tuple(p.shape) for name, p in ours.named_parameters()
    }
    if not sizes:  # diffusers converts the published sizes only
        assert convert_wan_vae_to_diffusers(dict(originals)) == {name: name for name in theirs}
        assert len(originals) == 194


def test_vae_pairs_are_all_used() -> None:
    sizes = {"dim_mult": [2, 1, 3], "temperal_downsample": [True, True], "num_res_blocks": 1}
    key_map = vae_key_map(3, 1)
    originals = originals_of(key_map, names_of(AutoencoderKLWan, base_dim=6, **sizes))
    unused = unused_pairs(key_map, originals)
    # a shortcut exists only where the width changes: never in the middle or a second block
    assert unused == {
        *(f"{half}.middle.{i}.shortcut" for half in ("encoder", "decoder") for i in (0, 2)),
        *(f"decoder.upsamples.{i}.shortcut" for i in (0, 1, 4, 7)),
    }


def umt5(**sizes: Any) -> UMT5EncoderModel:
    return UMT5EncoderModel(UMT5Config(**sizes))


def test_text_encoder_names() -> None:
    sizes = {
        "vocab_size": 50,
        "d_model": 24,
        "d_kv": 5,
        "d_ff": 30,
        "num_layers": 3,
        "num_heads": 4,
    }
    with torch.device("meta"):
        theirs = umt5(**sizes).state_dict()
        ours = UMT5Encoder(
            TextEncoderConfig(
                vocab_size=50, dim=24, ffn_dim=30, num_heads=4, head_dim=5, num_layers=3
            )
        )
    for copy, kept in TIED["text_encoder"].items():
        assert theirs.pop(copy).shape == theirs[kept].shape
    originals = originals_of(TEXT_ENCODER, set(theirs))
    assert {o: tuple(theirs[n].shape) for o, n in originals.items()} == {
        name: tuple(p.shape) for name, p in ours.named_parameters()
    }
    assert unused_pairs(TEXT_ENCODER, originals) == set()


def test_text_encoder_has_as_many_tensors_as_published() -> None:
    sizes = {"d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 256384}
    theirs = names_of(umt5, d_model=4096, d_kv=64, **sizes) - set(TIED["text_encoder"])
    assert len(originals_of(TEXT_ENCODER, theirs)) == 242


def test_text_encoder_gate_is_the_activated_half() -> None:
    model = umt5(vocab_size=9, d_model=6, d_kv=3, d_ff=10, num_layers=1, num_heads=2).eval()
    layer = model.encoder.block[0].layer[1].DenseReluDense
    weights = {TEXT_ENCODER.to_original(k): v for k, v in model.state_dict().items()}
    x = torch.randn(4, 6)
    gate, fc1, fc2 = (weights[f"blocks.0.ffn.{leaf}.weight"] for leaf in ("gate.0", "fc1", "fc2"))
    expected = (functional.gelu(x @ gate.T, approximate="tanh") * (x @ fc1.T)) @ fc2.T
    torch.testing.assert_close(layer(x), expected)


def is_harmless(name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern, _ in IGNORED["image_encoder"])


def test_image_encoder_names() -> None:
    config = CLIPVisionConfig(
        hidden_size=24, intermediate_size=50, num_hidden_layers=3, num_attention_heads=3,
        image_size=28, patch_size=14,
    )  # fmt: skip
    with torch.device("meta"):
        theirs = {
            name: tuple(tensor.shape)
            for name, tensor in CLIPVisionModel(config).state_dict().items()
            if not is_harmless(name)
        }
        # The last layer is never read; with one more, ours has as many as theirs.
        ours = ImageEncoder(
            ImageEncoderConfig(dim=24, ffn_dim=50, num_heads=3, num_layers=4, image_size=28)
        )
    originals = originals_of(IMAGE_ENCODER, set(theirs))
    assert unused_pairs(IMAGE_ENCODER, originals) == set()
    shapes = {original: theirs[name] for original, name in originals.items()}
    for name, axes in LEADING_AXES["image_encoder"].items():
        shapes[name] = (*(1,) * axes, *shapes[name])
    for whole, parts in CONCATENATED["image_encoder"].items():
        for name in [name for name in shapes if f".{parts[0]}." in name]:
            joined = [shapes.pop(name.replace(parts[0], part)) for part in parts]
            height = sum(shape[0] for shape in joined)
            shapes[name.replace(parts[0], whole)] = (height, *joined[0][1:])
    assert shapes == {name: tuple(p.shape) for name, p in ours.named_parameters()}


@pytest.mark.parametrize(
    ("name", "harmless"),
    [
        ("log_scale", True),
        ("textual.token_embedding.weight", True),
        ("textual.blocks.0.attn.q.weight", True),
        ("visual.post_norm.weight", True),
        ("visual.head", True),
        ("vision_model.post_layernorm.bias", True),
        ("vision_model.embeddings.position_ids", True),
        ("embeddings.position_ids", True),
        ("visual_projection.weight", True),
        ("visual.pre_norm.weight", False),
        ("visual.pos_embedding", False),
        ("visual.headroom", False),
        ("vision_model.encoder.layers.0.self_attn.q_proj.weight", False),
        ("lora.textual.weight", False),
    ],
)
def test_what_nobody_reads_of_clip(name: str, harmless: bool) -> None:
    assert is_harmless(name) == harmless


@pytest.mark.parametrize(
    "key_map",
    [DIT, TEXT_ENCODER, IMAGE_ENCODER, vae_key_map(4, 2)],
    ids=["dit", "t5", "clip", "vae"],
)
@pytest.mark.parametrize(
    "name",
    ["", ".", "weight", "blocks.0", "blocks.x.norm3.weight", "blocks.0.norm9.weight", "a..b"],
)
def test_unknown_names_have_no_counterpart(key_map: KeyMap, name: str) -> None:
    assert key_map.to_original(name) is None
    assert key_map.to_diffusers(name) is None
