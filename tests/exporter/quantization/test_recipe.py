"""Which layers can be 8-bit, by arithmetic on the sizes of the networks, and how that is told."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from wanx.bundle.manifest import Quantization
from wanx.config.models import PRESETS, DiTConfig
from wanx.errors import UsageError
from wanx.exporter.quantization.recipe import (
    Recipe,
    dit_candidates,
    recipe_from_manifest,
    require_matches,
    shared_input,
    smoothing_of,
    text_recipe,
)
from wanx.exporter.quantization.scheme import SCHEMES, QuantizeOptions
from wanx.models.dit.model import WanDiT
from wanx.models.text_encoder import UMT5Encoder

SELF = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o")
CROSS = ("cross_attn.q", "cross_attn.k", "cross_attn.v", "cross_attn.o")
IMAGE = ("cross_attn.k_img", "cross_attn.v_img")
FFN = ("ffn.0", "ffn.2")
ALL = QuantizeOptions()
SMALL = DiTConfig(dim=48, ffn_dim=100, num_heads=4, num_layers=3)


def names(stack: str, count: int, layers: Iterable[str]) -> set[str]:
    return {f"{stack}.{i}.{layer}" for i in range(count) for layer in layers}


def expected(config: DiTConfig) -> set[str]:
    inside = (*SELF, *CROSS, *FFN)
    main = inside if config.image_dim is None else (*inside, *IMAGE)
    return names("blocks", config.num_layers, main) | names(
        "vace_blocks", len(config.vace_layers), inside
    )


COUNTS = {
    "t2v-1.3B": 30 * 10,
    "t2v-14B": 40 * 10,
    "i2v-14B": 40 * 12,
    "flf2v-14B": 40 * 12,
    "vace-1.3B": (30 + 15) * 10,
    "vace-14B": (40 + 8) * 10,
    "tiny": 6 * 10,
    "tiny-i2v": 6 * 12,
    "tiny-flf2v": 6 * 12,
    "tiny-vace": (6 + 3) * 10,
}


@pytest.mark.parametrize("preset", PRESETS)
def test_candidates_of_every_preset(preset: str) -> None:
    config = PRESETS[preset].dit
    wanted, kept = dit_candidates(config, ALL)
    assert kept == {}
    assert len(wanted) == len(set(wanted)) == COUNTS[preset]
    assert set(wanted) == expected(config)


@pytest.mark.parametrize("preset", ["t2v-14B", "tiny"])
def test_text_encoder(preset: str) -> None:
    config = PRESETS[preset].text_encoder
    recipe = text_recipe(config)
    assert len(recipe.layers) == 7 * config.num_layers
    assert set(recipe.layers.values()) == {None}
    with torch.device("meta"):
        parameters = dict(UMT5Encoder(config).named_parameters())
    # Everything with two sides but the tables of relative positions.
    big = {
        name
        for name, value in parameters.items()
        if value.ndim == 2 and min(value.shape) > config.num_buckets
    }
    assert recipe.weights == big
    assert recipe.scheme.name == "int8-weight"


@pytest.mark.parametrize(
    ("dim", "ffn_dim", "narrow"),
    [
        (1024, 512, 512),
        (1024, 513, None),
        (1024, 64, 64),
        (513, 1000, None),
        (512, 2048, None),  # the model itself is that narrow
        (512, 511, 511),
        (128, 512, None),
        (128, 128, None),
        (128, 127, 127),
        (36, 4, 4),
    ],
)
def test_narrow_layers_stay_high(dim: int, ffn_dim: int, narrow: int | None) -> None:
    config = DiTConfig(dim=dim, ffn_dim=ffn_dim, num_heads=1, num_layers=2)
    wanted, kept = dit_candidates(config, ALL)
    reason = {} if narrow is None else dict.fromkeys(names("blocks", 2, FFN), f"{narrow} features")
    assert kept == reason
    assert set(wanted) == expected(config) - kept.keys()


def test_every_candidate_is_a_linear_with_a_bias() -> None:
    config = replace(SMALL, vace_layers=(0, 2), image_dim=20)
    with torch.device("meta"):
        model = WanDiT(config)
    for name in dit_candidates(config, ALL)[0]:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        assert layer.bias is not None


@pytest.mark.parametrize(
    ("patterns", "kept"),
    [
        (("blocks.0.*",), names("blocks", 1, (*SELF, *CROSS, *FFN))),
        (("blocks.1.ffn.2",), {"blocks.1.ffn.2"}),
        (("*.cross_attn.k",), names("blocks", 3, ["cross_attn.k"])),
        (("blocks.[02].ffn.?",), {f"blocks.{i}.{layer}" for i in (0, 2) for layer in FFN}),
        (("*.q", "*.o"), names("blocks", 3, (SELF[0], SELF[3], CROSS[0], CROSS[3]))),
    ],
)
def test_patterns(patterns: tuple[str, ...], kept: set[str]) -> None:
    wanted, found = dit_candidates(SMALL, QuantizeOptions(skip_layers=patterns))
    assert found == dict.fromkeys(kept, "--skip-layers")
    assert set(wanted) == expected(SMALL) - kept
    require_matches(patterns, (*wanted, *found))


def test_a_pattern_for_blocks_leaves_the_control_branch() -> None:
    config = replace(SMALL, vace_layers=(0, 2))
    _, kept = dit_candidates(config, QuantizeOptions(skip_layers=("blocks.*",)))
    assert set(kept) == names("blocks", 3, (*SELF, *CROSS, *FFN))


@pytest.mark.parametrize("patterns", [("*",), ("blocks.*",), ("*attn*", "*.ffn.*")])
def test_patterns_that_match_everything(patterns: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match=r"all 30 layers are kept high.*; narrow --skip-layers"):
        dit_candidates(SMALL, QuantizeOptions(skip_layers=patterns))


@pytest.mark.parametrize("pattern", ["blocks.3.*", "Blocks.0.*", "ffn.0", "", "blocks.0.ffn.0 "])
def test_a_pattern_that_matches_nothing(pattern: str) -> None:
    layers, _ = dit_candidates(SMALL, ALL)
    with pytest.raises(UsageError) as caught:
        require_matches(["*.ffn.0", pattern], layers)
    assert f"--skip-layers {pattern!r} matches no layer" in str(caught.value)
    assert layers[0] in str(caught.value)


def test_shared_inputs() -> None:
    config = replace(SMALL, vace_layers=(0, 2), image_dim=20)
    first = {
        "self_attn.k": "self_attn.q",
        "self_attn.v": "self_attn.q",
        "cross_attn.v": "cross_attn.k",
        "cross_attn.v_img": "cross_attn.k_img",
    }
    for name in dit_candidates(config, ALL)[0]:
        stack, index, layer = name.split(".", 2)
        assert shared_input(name) == f"{stack}.{index}.{first.get(layer, layer)}"


def test_layers_that_share_an_input_do_read_the_same_tensor() -> None:
    config = replace(SMALL, image_dim=20, image_tokens=3, vace_layers=(0, 2), text_len=5)
    torch.manual_seed(0)
    model = WanDiT(config)
    seen: dict[str, int] = {}
    for name in dit_candidates(config, ALL)[0]:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: seen.__setitem__(name, inputs[0].data_ptr())
        )
    kept = []  # or memory would be used again, and equal pointers mean nothing
    for module in model.modules():
        module.register_forward_hook(lambda _, inputs, output: kept.append((inputs, output)))
    angles = torch.zeros(4, 6)
    model(
        torch.randn(1, 4, 64), torch.tensor([5.0]), torch.randn(1, 5, 4096), angles.cos(),
        angles.sin(), torch.randn(1, 3, 20), torch.randn(1, 4, 384), torch.ones(2),
    )  # fmt: skip
    groups: dict[str, set[int]] = {}
    for name, pointer in seen.items():
        groups.setdefault(shared_input(name), set()).add(pointer)
    assert all(len(pointers) == 1 for pointers in groups.values())
    for block in (f"blocks.{i}" for i in range(3)):
        # The text and the images are the same for all blocks, anything else is not.
        own = [groups[f"{block}.{layer}"] for layer in (SELF[0], SELF[3], CROSS[0], CROSS[3], *FFN)]
        assert len(set.union(*own)) == len(own)


def test_smoothing_groups() -> None:
    config = replace(SMALL, vace_layers=(0, 2), image_dim=20)
    vectors = {
        "self_attn.q": "attn_smooth",
        "self_attn.k": "attn_smooth",
        "self_attn.v": "attn_smooth",
        "ffn.0": "ffn_smooth",
    }
    for name in dit_candidates(config, ALL)[0]:
        stack, index, layer = name.split(".", 2)
        vector = vectors.get(layer)
        assert smoothing_of(name) == (None if vector is None else f"{stack}.{index}.{vector}")


def recipe_of(layers: Iterable[str], **fields: Any) -> Recipe:
    return Recipe(scheme=SCHEMES["fp8"], layers=dict.fromkeys(layers, 0.5), **fields)


def test_alike_blocks() -> None:
    layers = names("blocks", 12, (*SELF, *FFN))
    assert recipe_of(layers).is_repeated("blocks", 12)
    assert recipe_of([]).is_repeated("blocks", 12)
    assert recipe_of(layers | names("vace_blocks", 1, ["ffn.0"])).is_repeated("blocks", 12)
    assert not recipe_of(layers).is_repeated("blocks", 13)
    for lost in ("blocks.0.ffn.0", "blocks.11.self_attn.q"):
        assert not recipe_of(layers - {lost}).is_repeated("blocks", 12)
    assert recipe_of({"blocks.0.ffn.0"}).is_repeated("blocks", 1)


@pytest.mark.parametrize("missing", [None, 1])
def test_alike_blocks_have_the_same_smoothing_and_attention(missing: int | None) -> None:
    layers = names("blocks", 3, SELF)
    blocks = [i for i in range(3) if i != missing]
    smooth = {f"blocks.{i}.attn_smooth": torch.ones(48) for i in blocks}
    attention = {f"blocks.{i}.self_attn.attend": (1.0, 1.0, 1.0) for i in blocks}
    alike = missing is None
    assert recipe_of(layers, smooth=smooth).is_repeated("blocks", 3) == alike
    assert recipe_of(layers, attention=attention).is_repeated("blocks", 3) == alike


def test_keeping_more_layers() -> None:
    recipe = recipe_of(
        ["blocks.0.ffn.0", "blocks.0.ffn.2"], unquantized_layers={"blocks.0.self_attn.q": "a"}
    )
    less = recipe.without({"blocks.0.ffn.2": "b"})
    assert less.layers == {"blocks.0.ffn.0": 0.5}
    assert less.unquantized_layers == {"blocks.0.self_attn.q": "a", "blocks.0.ffn.2": "b"}
    assert less.weights == {"blocks.0.ffn.0.weight"}
    assert len(recipe.layers) == 2


def test_the_manifest_tells_the_recipe() -> None:
    options = QuantizeOptions(smooth=0.5, attention="fp8", weight_scale="tensor")
    recipe = Recipe(
        scheme=SCHEMES["fp8"],
        options=options,
        layers={"blocks.0.ffn.0": 0.25, "blocks.0.ffn.2": None},
        unquantized_layers={"blocks.0.self_attn.q": "SQNR 12.0 dB, below 25"},
        sqnr_db={"blocks.0.ffn.0": 31.5, "blocks.0.self_attn.q": 12.0},
        smooth={"blocks.0.ffn_smooth": torch.ones(4)},
        attention={"blocks.0.self_attn.attend": (1.0, 2.0, 3.0)},
    )
    record = recipe.record({"fp8": 2}, {"MatMul": 9})
    assert Quantization.model_validate_json(record.model_dump_json(by_alias=True)) == record
    assert record.model_dump(by_alias=True) == {
        "scheme": "fp8",
        "weight_scale": "tensor",
        "activation_scale": "static",
        "smooth": 0.5,
        "attention": "fp8",
        "layers": {
            "blocks.0.ffn.0": {"input_scale": 0.25, "sqnr_db": 31.5},
            "blocks.0.ffn.2": {"input_scale": None, "sqnr_db": None},
        },
        "kept": {"blocks.0.self_attn.q": "SQNR 12.0 dB, below 25"},
        "kept_weights": 0,
        "found": {"fp8": 2},
        "kernels": {"MatMul": 9},
    }


def test_the_manifest_tells_what_was_done_not_what_was_asked() -> None:
    """Where every smoothing vector and every attention fell back, there are none."""
    options = QuantizeOptions(smooth=0.5, attention="fp8", activation_scale="dynamic")
    record = Recipe(scheme=SCHEMES["fp8"], options=options, layers={"blocks.0.ffn.2": None}).record(
        {}, {}
    )
    assert (record.smooth, record.attention, record.activation_scale) == (0.0, "high", "dynamic")


@pytest.mark.parametrize("word", ["high", "none", "fp8"])
def test_either_word_of_a_manifest_for_no_8_bit_attention(word: str) -> None:
    """Bundles say "high", whose option is called none; one that says "none" is read as well."""
    data = {"scheme": "fp8", "weight_scale": "channel", "activation_scale": "static"}
    data |= {"attention": word, "layers": {}, "kept": {"blocks.0.ffn.0": "512 features"}}
    record = Quantization.model_validate_json(json.dumps(data | {"found": {"fp8": 3}}))
    assert record.unquantized_layers == data["kept"]
    assert record.verified_counts == {"fp8": 3}
    recipe = recipe_from_manifest(record, {})
    assert recipe.options.attention == ("fp8" if word == "fp8" else "none")


def test_the_manifest_of_a_text_encoder() -> None:
    record = text_recipe(PRESETS["tiny"].text_encoder).record({"int8-weight": 15}, {})
    assert (record.scheme, record.weight_scale, record.activation_scale) == (
        "int8-weight", "channel", "none",
    )  # fmt: skip
    assert len(record.layers) == 7 * 2 + 1
    assert "token_embedding" in record.layers
    assert {layer.input_scale for layer in record.layers.values()} == {None}
