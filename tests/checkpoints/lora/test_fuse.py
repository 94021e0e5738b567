"""LoRAs against the formula in float64, and against Diffusers' own fusion."""

from __future__ import annotations

import functools
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers
from safetensors.torch import save_file

from wanx.checkpoints import key_maps
from wanx.checkpoints.lora.fuse import Lora, fuse, parse_loras
from wanx.checkpoints.lora.names import PREFIXES, SUFFIXES, layer_names, parse_name
from wanx.checkpoints.tensors.source import SafetensorsTensor
from wanx.checkpoints.weights import ComponentWeights
from wanx.config.models import PRESETS
from wanx.errors import CorruptInputError, UsageError
from wanx.exporter.components import expected_tensors
from wanx.files.safetensors import read_header

CONFIG = PRESETS["tiny"].dit
STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
Tensors = dict[str, torch.Tensor]


@functools.cache
def shapes(preset: str = "tiny") -> dict[str, tuple[int, ...]]:
    config = PRESETS[preset]
    found = dict(expected_tensors(config)["dit"])
    found["patch_embedding.weight"] = (config.dit.dim, config.dit.in_dim, 1, 2, 2)
    return found


def weights_of(
    path: Path, preset: str = "tiny", dtype: torch.dtype = torch.float32
) -> ComponentWeights:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator).mul(0.05).to(dtype)
        for name, shape in shapes(preset).items()
    }
    save_file(tensors, path)
    refs = read_header(path).entries
    return ComponentWeights(
        component="dit", files=(path,),
        tensors={name: SafetensorsTensor.from_ref(ref) for name, ref in refs.items()},
    )  # fmt: skip


def numbers(source: Any, dtype: str = "F32") -> torch.Tensor:
    data = b"".join(bytes(piece) for piece in source.iter_converted(dtype))
    return torch.frombuffer(bytearray(data), dtype=STORED[dtype]).reshape(source.shape)


def low_rank(
    rank: int, layers: list[str], seed: int = 1, dtype: torch.dtype = torch.float32
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Matrices of layers, ``up`` and ``down``, the latter in the shape of a convolution's."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer in layers:
        out, *inner = shapes()[f"{layer}.weight"]
        up = torch.randn((out, rank, *(1 for _ in inner[1:])), generator=generator) * 0.1
        down = torch.randn((rank, *inner), generator=generator) * 0.1
        found[layer] = (up.to(dtype), down.to(dtype))
    return found


def linears() -> list[str]:
    return [
        name.removesuffix(".weight")
        for name, shape in shapes().items()
        if name.endswith(".weight") and len(shape) > 1
    ]


def formula(
    base: torch.Tensor, up: torch.Tensor, down: torch.Tensor, factor: float
) -> torch.Tensor:
    rank = len(down)
    product = up.double().reshape(-1, rank) @ down.double().reshape(rank, -1)
    return base.double() + factor * product.reshape(base.shape)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_weights_are_the_formula(stored: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """In float64, to half a unit in the last place of the stored type."""
    weights = weights_of(tmp_path / "dit.safetensors")
    layers = linears()
    files, expected = [], {n: numbers(s).double() for n, s in weights.tensors.items()}
    for number, (rank, strength, alpha) in enumerate([(4, 0.75, 2.0), (3, -1.5, None)]):
        tensors = {}
        for layer, (up, down) in low_rank(rank, layers, number, dtype).items():
            tensors |= {f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down}
            if alpha is not None:
                tensors[f"{layer}.alpha"] = torch.tensor(alpha)
            factor = strength * (1.0 if alpha is None else alpha / rank)
            name = f"{layer}.weight"
            expected[name] = formula(expected[name], up, down, factor)
        path = tmp_path / f"{number}.safetensors"
        save_file(tensors, path)
        files.append(Lora(path=path, strength=strength))
    fused, reports = fuse(weights, files)
    assert [(report.matched, report.unmatched) for report in reports] == [
        (3 * len(layers), ()), (2 * len(layers), ()),
    ]  # fmt: skip
    for name, source in fused.tensors.items():
        found = numbers(source, stored)
        info = torch.finfo(STORED[stored])
        exponent = torch.frexp(found.double())[1] - 1
        ulp = torch.ldexp(torch.full(found.shape, info.eps, dtype=torch.float64), exponent)
        ulp = ulp.clamp(min=info.smallest_normal * info.eps)
        assert ((found.double() - expected[name]).abs() <= (0.5 + 1e-6) * ulp).all(), name
        assert source.storage == "F32"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> ComponentWeights:
    """Weights that many tests read."""
    return weights_of(tmp_path_factory.mktemp("weights") / "dit.safetensors")


SUFFIX_CASES = [
    (".lora_up.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_A.weight"),
    (".lora_B", ".lora_A"), (".lora_B.default.weight", ".lora_A.default.weight"),
    ("_lora.up.weight", "_lora.down.weight"), (".lora.up.weight", ".lora.down.weight"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
]  # fmt: skip
PREFIX_CASES = [
    *("", "diffusion_model.", "transformer.", "lora_unet_", "lora_unet__", "base_model.model."),
    *("pipe.dit.", "lycoris_", "base_model.model.diffusion_model."),
]


# Every prefix with both namings, and each with every other suffix; all of the products take long.
@pytest.mark.parametrize(
    ("prefix", "named", "suffixes"),
    [
        (prefix, named, SUFFIX_CASES[(number + shift) % len(SUFFIX_CASES)])
        for number, prefix in enumerate(PREFIX_CASES)
        for named, shift in (("original", 0), ("diffusers", 3))
    ],
)
def test_every_way_to_name_a_layer(
    prefix: str,
    named: str,
    suffixes: tuple[str, str],
    shared: ComponentWeights,
    tmp_path: Path,
) -> None:
    weights = shared
    layers = ["blocks.1.self_attn.q", "blocks.0.cross_attn.o", "blocks.0.ffn.0", "head.head",
              "time_projection.1", "text_embedding.2", "patch_embedding"]  # fmt: skip
    tensors: Tensors = {}
    for layer, pair in low_rank(2, layers).items():
        name = layer if named == "original" else key_maps.DIT.to_diffusers(layer) or ""
        assert name
        if prefix.endswith("_"):
            name = name.replace(".", "_")
        tensors |= {
            prefix + name + suffix: part for suffix, part in zip(suffixes, pair, strict=True)
        }
    save_file(tensors, tmp_path / "lora.safetensors")
    fused, (report,) = fuse(weights, [Lora(path=tmp_path / "lora.safetensors")])
    assert (report.matched, report.unmatched) == (len(tensors), ())
    for layer, (up, down) in low_rank(2, layers).items():
        before, after = (numbers(w.tensors[f"{layer}.weight"]) for w in (weights, fused))
        torch.testing.assert_close(
            after.double(), formula(before, up, down, 1.0), rtol=1e-6, atol=1e-8
        )
    changed = {f"{layer}.weight" for layer in layers}
    for name, source in fused.tensors.items():
        assert (source is weights.tensors[name]) == (name not in changed)


def test_differences_and_replacements(tmp_path: Path) -> None:
    """Of weights, biases, norms and modulations, as LightX2V's extractor writes them."""
    weights = weights_of(tmp_path / "dit.safetensors")
    draw = torch.Generator().manual_seed(3)

    def like(name: str) -> torch.Tensor:
        return torch.randn(shapes()[name], generator=draw) * 0.01

    added = {
        "diffusion_model.blocks.0.self_attn.q.diff_b": "blocks.0.self_attn.q.bias",
        "diffusion_model.blocks.0.norm3.diff": "blocks.0.norm3.weight",
        "diffusion_model.blocks.1.norm3.w_norm": "blocks.1.norm3.weight",
        "diffusion_model.blocks.1.norm3.b_norm": "blocks.1.norm3.bias",
        "diffusion_model.blocks.1.diff_m": "blocks.1.modulation",
        "diffusion_model.blocks.0.modulation.diff": "blocks.0.modulation",
        "diffusion_model.head.diff_m": "head.modulation",
        "diffusion_model.head.head.diff": "head.head.weight",
        "diffusion_model.patch_embedding.diff": "patch_embedding.weight",
    }
    replaced = {"diffusion_model.time_embedding.0.set_weight": "time_embedding.0.weight"}
    tensors = {key: like(name) for key, name in (added | replaced).items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    fused, (report,) = fuse(weights, [Lora(path=tmp_path / "lora.safetensors", strength=0.5)])
    assert (report.matched, report.unmatched) == (len(tensors), ())
    for key, name in added.items():
        before, after = (numbers(w.tensors[name]).double() for w in (weights, fused))
        torch.testing.assert_close(
            after, before + 0.5 * tensors[key].double(), rtol=1e-6, atol=1e-9
        )
    for key, name in replaced.items():
        assert torch.equal(numbers(fused.tensors[name]), tensors[key])


def peer(tensors: Tensors, dtype: torch.dtype = torch.float32) -> WanTransformer3DModel:
    model = WanTransformer3DModel(
        num_attention_heads=CONFIG.num_heads, attention_head_dim=CONFIG.dim // CONFIG.num_heads,
        in_channels=CONFIG.in_dim, out_channels=CONFIG.out_dim, text_dim=CONFIG.text_dim,
        freq_dim=CONFIG.freq_dim, ffn_dim=CONFIG.ffn_dim, num_layers=CONFIG.num_layers,
        cross_attn_norm=True,
    )  # fmt: skip
    renamed = {key_maps.DIT.to_diffusers(name) or name: t for name, t in tensors.items()}
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    assert not missing
    assert not unexpected
    return model


@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_diffusers_fuses_the_same(alpha: float | None, strength: float, tmp_path: Path) -> None:
    """``load_lora_adapter`` and ``fuse_lora`` on its own conversion of the file."""
    weights = weights_of(tmp_path / "dit.safetensors")
    layers = [layer for layer in linears() if layer.startswith("blocks.")]
    tensors: Tensors = {}
    for layer, (up, down) in low_rank(4, layers).items():
        tensors |= {f"diffusion_model.{layer}.lora_up.weight": up}
        tensors |= {f"diffusion_model.{layer}.lora_down.weight": down}
        if alpha is not None:
            tensors[f"diffusion_model.{layer}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "lora.safetensors")
    fused, _ = fuse(weights, [Lora(path=tmp_path / "lora.safetensors", strength=strength)])
    model = peer({name: numbers(source) for name, source in weights.tensors.items()})
    model.load_lora_adapter(
        _convert_non_diffusers_wan_lora_to_diffusers(dict(tensors)), prefix="transformer"
    )
    model.fuse_lora(lora_scale=strength)
    model.unload_lora()
    theirs = model.state_dict()
    for name, source in fused.tensors.items():
        expected = theirs[key_maps.DIT.to_diffusers(name) or name]
        torch.testing.assert_close(numbers(source), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stabilised", [True, False])
def test_alpha_in_the_header_of_diffusers(stabilised: bool, tmp_path: Path) -> None:
    weights = weights_of(tmp_path / "dit.safetensors")
    ((layer, (up, down)),) = low_rank(4, ["blocks.0.ffn.2"]).items()
    name = key_maps.DIT.to_diffusers(layer)
    tensors = {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    facts = {"transformer.lora_alpha": 8, "transformer.r": 4, "transformer.use_rslora": stabilised}
    save_file(tensors, tmp_path / "l.safetensors", {"lora_adapter_metadata": json.dumps(facts)})
    fused, _ = fuse(weights, [Lora(path=tmp_path / "l.safetensors")])
    before, after = (numbers(w.tensors[f"{layer}.weight"]) for w in (weights, fused))
    expected = formula(before, up, down, 8 / (2 if stabilised else 4))
    torch.testing.assert_close(after.double(), expected, rtol=1e-6, atol=1e-8)


def test_names_of_every_task_have_one_meaning() -> None:
    for preset in ("tiny", "tiny-i2v", "tiny-vace", "i2v-14B", "flf2v-14B", "vace-14B"):
        names = expected_tensors(PRESETS[preset])["dit"]
        meanings = layer_names(names)
        layers = {n.removesuffix(".weight").removesuffix(".bias") for n in names}
        assert set(meanings.values()) == layers
        for layer in layers:
            assert meanings[layer] == meanings[layer.replace(".", "_")] == layer


def test_every_name_that_diffusers_converts_has_its_place() -> None:
    """Files whose names Diffusers' converter takes; ours finds a layer for each of them."""
    config = replace(CONFIG, num_layers=2)
    layers = [f"blocks.{n}.{part}" for n in range(2) for part in (
        *(f"{a}_attn.{leaf}" for a in ("self", "cross") for leaf in ("q", "k", "v", "o")),
        "cross_attn.k_img", "cross_attn.v_img", "ffn.0", "ffn.2",
    )]  # fmt: skip
    layers += ["time_projection.1", "text_embedding.0", "text_embedding.2", "time_embedding.0"]
    layers += ["time_embedding.2", "head.head", "img_emb.proj.1", "img_emb.proj.3"]
    assert config.num_layers == 2
    state = {}
    for layer in layers:
        state[f"diffusion_model.{layer}.lora_down.weight"] = torch.zeros(1, 4)
        state[f"diffusion_model.{layer}.lora_up.weight"] = torch.zeros(4, 1)
    converted = _convert_non_diffusers_wan_lora_to_diffusers(dict(state))
    meanings = layer_names([f"{layer}.weight" for layer in layers])
    for name in (*state, *converted):
        parsed = parse_name(name)
        assert parsed is not None, name
        assert parsed.layer in meanings, name
    assert {meanings[parse_name(name).layer] for name in converted} == set(layers)  # type: ignore[union-attr]


def test_the_tables_have_no_name_twice() -> None:
    assert len(set(PREFIXES)) == len(PREFIXES)
    assert all(parse_name(f"a{suffix}") is not None for suffix in SUFFIXES)
    assert parse_name("blocks.0.self_attn.q.weight") is None


def saved(path: Path, tensors: Tensors) -> Lora:
    save_file({name: t.clone() for name, t in tensors.items()}, path)
    return Lora(path=path)


UP, DOWN = torch.zeros(CONFIG.dim, 2), torch.zeros(2, CONFIG.dim)
Q = "blocks.0.self_attn.q"


def test_what_fits_is_applied_and_the_rest_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A LoRA for images on a model without them."""
    weights = weights_of(tmp_path / "dit.safetensors")
    tensors = {f"{Q}.lora_up.weight": UP, f"{Q}.lora_down.weight": DOWN}
    for layer in ("blocks.0.cross_attn.k_img", "img_emb.proj.1"):
        tensors |= {f"{layer}.lora_up.weight": UP, f"{layer}.lora_down.weight": DOWN}
    tensors["lora_te_x"] = torch.zeros(1)
    _, (report,) = fuse(weights, [saved(tmp_path / "lora.safetensors", tensors)])
    assert report.matched == 2
    assert set(report.unmatched) == set(tensors) - {f"{Q}.lora_up.weight", f"{Q}.lora_down.weight"}
    (line,) = caplog.messages
    assert "5 of 7 tensors fit nothing in this model and are left out: " in line


REFUSED: list[tuple[str, Tensors, type[Exception], str]] = [
    ("nothing fits", {"x.lora_up.weight": UP, "x.lora_down.weight": DOWN}, UsageError,
     "nothing in .* fits this model: it holds x.lora_"),
    ("no LoRA", {"blocks.0.self_attn.q.weight": UP}, UsageError, "is no LoRA: it holds blocks.0"),
    ("half", {f"{Q}.lora_up.weight": UP}, CorruptInputError, "without its other half"),
    ("other width", {f"{Q}.lora_up.weight": UP[:-1], f"{Q}.lora_down.weight": DOWN}, UsageError,
     r"is of a model of other sizes \(1 in all\): .*lora_up.weight \[.*\] and .* for \["),
    ("other rank", {f"{Q}.lora_up.weight": UP, f"{Q}.lora_down.weight": DOWN[:1]}, UsageError,
     "is of a model of other sizes"),
    ("other difference", {f"{Q}.diff": UP}, UsageError, "is of a model of other sizes"),
    ("DoRA", {f"{Q}.dora_scale": UP}, UsageError, "an adapter of the kind DoRA"),
    ("LoKr", {f"{Q}.lokr_w1": UP}, UsageError, "an adapter of the kind LoKr"),
    ("LoHa", {f"{Q}.hada_w1_a": UP}, UsageError, "an adapter of the kind LoHa"),
    ("middle", {f"{Q}.lora_mid.weight": UP}, UsageError, "LoCon with a middle"),
    ("twice", {f"{Q}.lora_up.weight": UP, f"diffusion_model.{Q}.lora_B.weight": UP},
     CorruptInputError, "holds the up tensor of 'blocks.0.self_attn.q' twice"),
    ("two names", {f"{Q}.lora_up.weight": UP, f"{Q}.lora_down.weight": DOWN,
                   "transformer.blocks.0.attn1.to_q.lora_A.weight": DOWN,
                   "transformer.blocks.0.attn1.to_q.lora_B.weight": UP},
     CorruptInputError, "holds the .* tensor of 'blocks.0.self_attn.q' twice, as "),
    ("transposed", {"blocks.0.ffn.0.diff": torch.zeros(CONFIG.dim, CONFIG.ffn_dim)}, UsageError,
     "is of a model of other sizes"),
    ("integers", {f"{Q}.lora_up.weight": UP.int(), f"{Q}.lora_down.weight": DOWN}, UsageError,
     "is I32, and wanx reads LoRAs in F32, F16, BF16 and 8-bit floats"),
    ("no rank", {f"{Q}.lora_up.weight": UP[:, :0], f"{Q}.lora_down.weight": DOWN[:0],
                 f"{Q}.alpha": torch.tensor(1.0)}, CorruptInputError, "which has no rank"),
    ("scalars", {f"{Q}.lora_up.weight": UP, f"{Q}.lora_down.weight": torch.tensor(1.0),
                 f"{Q}.alpha": torch.tensor(1.0)}, CorruptInputError, "which has no rank"),
    ("alphas", {f"{Q}.lora_up.weight": UP, f"{Q}.lora_down.weight": DOWN, f"{Q}.alpha": UP},
     CorruptInputError, "numbers instead of one"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("tensors", "kind", "text"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
@pytest.mark.fault("LoRA of a kind that is not fused")
def test_what_is_refused(
    tensors: Tensors, kind: type[Exception], text: str, tmp_path: Path
) -> None:
    weights = weights_of(tmp_path / "dit.safetensors")
    with pytest.raises(kind, match=text) as caught:
        fuse(weights, [saved(tmp_path / "lora.safetensors", tensors)])
    assert "\n" not in str(caught.value)


@pytest.mark.fault("LoRA of another model")
def test_three_of_many_misfits_are_listed(tmp_path: Path) -> None:
    weights = weights_of(tmp_path / "dit.safetensors")
    tensors = {}
    for leaf in "qkvo":
        layer = f"blocks.0.self_attn.{leaf}"
        tensors |= {f"{layer}.lora_up.weight": UP[1:], f"{layer}.lora_down.weight": DOWN}
    with pytest.raises(UsageError, match=r"\(4 in all\).*; and 1 more; use") as caught:
        fuse(weights, [saved(tmp_path / "lora.safetensors", tensors)])
    assert str(caught.value).count("lora_up") == 3


@pytest.mark.parametrize("where", ["up", "down", "diff", "alpha"])
@pytest.mark.fault("LoRA that is not finite")
def test_numbers_that_are_none(where: str, tmp_path: Path) -> None:
    """Named with the LoRA's file, not the model's."""
    weights = weights_of(tmp_path / "dit.safetensors")
    tensors = {f"{Q}.lora_up.weight": UP.clone(), f"{Q}.lora_down.weight": DOWN.clone()}
    tensors |= {f"{Q}.alpha": torch.tensor(1.0), f"{Q}.diff": torch.zeros(CONFIG.dim, CONFIG.dim)}
    name = next(name for name in tensors if where in name)
    tensors[name].view(-1)[-1] = torch.nan
    lora = saved(tmp_path / "lora.safetensors", tensors)
    with pytest.raises(CorruptInputError, match=r"lora.safetensors: tensor .* holds NaN"):
        numbers(fuse(weights, [lora])[0].tensors[f"{Q}.weight"])


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0), ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a:-1", "a", -1.0), ("x:y/a.safetensors:.5", "x:y/a.safetensors", 0.5),
        ("a:1e-1", "a", 0.1),
    ],
)  # fmt: skip
def test_strengths(text: str, path: str, strength: float) -> None:
    assert Lora.parse(text) == Lora(path=Path(path), strength=strength)


@pytest.mark.parametrize("text", ["a:1000", "a:x", "a.safetensors:", "a:1,5"])
def test_what_is_no_strength(text: str) -> None:
    with pytest.raises(UsageError, match="strength"):
        Lora.parse(text)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64, torch.bfloat16])
def test_alpha_is_of_any_type(dtype: torch.dtype, tmp_path: Path) -> None:
    weights = weights_of(tmp_path / "dit.safetensors")
    ((layer, (up, down)),) = low_rank(4, [Q]).items()
    tensors = {f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down}
    tensors[f"{layer}.alpha"] = torch.tensor(2, dtype=dtype)
    fused, _ = fuse(weights, [saved(tmp_path / "lora.safetensors", tensors)])
    before, after = (numbers(w.tensors[f"{layer}.weight"]) for w in (weights, fused))
    expected = formula(before, up, down, 0.5)
    torch.testing.assert_close(after.double(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("folder", [True, False])
def test_alpha_beside_the_file_of_peft(folder: bool, tmp_path: Path) -> None:
    weights = weights_of(tmp_path / "dit.safetensors")
    ((layer, (up, down)),) = low_rank(2, ["blocks.0.ffn.2"]).items()
    name = f"base_model.model.{key_maps.DIT.to_diffusers(layer)}"
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    lora = saved(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 32, "r": 2}))
    fused, _ = fuse(weights, [Lora(path=tmp_path) if folder else lora])
    before, after = (numbers(w.tensors[f"{layer}.weight"]) for w in (weights, fused))
    expected = formula(before, up, down, 16)
    torch.testing.assert_close(after.double(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("[" * 200_000, CorruptInputError), ("[]", CorruptInputError),
        ('{"transformer.lora_alpha": 1' + "0" * 400 + "}", CorruptInputError),
        ('{"transformer.lora_alpha": NaN}', CorruptInputError),
        ('{"transformer.lora_alpha": "8"}', CorruptInputError),
        ('{"transformer.lora_alpha": true}', CorruptInputError),
        ('{"transformer.alpha_pattern": 3}', UsageError),
        ('{"transformer.use_dora": true}', UsageError),
    ],
)  # fmt: skip
def test_headers_that_say_nothing(text: str, kind: type[Exception], tmp_path: Path) -> None:
    weights = weights_of(tmp_path / "dit.safetensors")
    path = tmp_path / "lora.safetensors"
    tensors = {f"{Q}.lora_up.weight": UP, f"{Q}.lora_down.weight": DOWN}
    save_file(tensors, path, {"lora_adapter_metadata": text})
    with pytest.raises(kind, match=r"lora\.safetensors") as caught:
        fuse(weights, [Lora(path=path)])
    assert "\n" not in str(caught.value)


def test_the_patches_of_another_task_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An I2V file on T2V: what is about its channels is said, the rest is applied."""
    weights = weights_of(tmp_path / "dit.safetensors")
    tensors = {f"{Q}.lora_up.weight": UP, f"{Q}.lora_down.weight": DOWN}
    tensors["patch_embedding.diff"] = torch.zeros(CONFIG.dim, 36, 1, 2, 2)
    _, (record,) = fuse(weights, [saved(tmp_path / "lora.safetensors", tensors)])
    assert (record.matched, record.unmatched) == (2, ("patch_embedding.diff",))
    assert "1 of 3 tensors fit nothing" in caplog.messages[0]


def test_a_record_is_bounded(tmp_path: Path) -> None:
    weights = weights_of(tmp_path / "dit.safetensors")
    tensors = {f"{Q}.lora_up.weight": UP, f"{Q}.lora_down.weight": DOWN}
    tensors |= {f"{'x' * 5000}{number}.diff": torch.zeros(1) for number in range(300)}
    _, (record,) = fuse(weights, [saved(tmp_path / "lora.safetensors", tensors)])
    assert len(record.unmatched) == 100
    assert max(map(len, record.unmatched)) <= 256


def test_lists_of_loras() -> None:
    assert parse_loras(["a:0.5", Path("b:c"), Lora(path=Path("d"))]) == (
        Lora(path=Path("a"), strength=0.5), Lora(path=Path("b:c")), Lora(path=Path("d")),
    )  # fmt: skip
    for one in ("a.safetensors", Path("a.safetensors")):
        with pytest.raises(UsageError, match="give a list"):
            parse_loras(one)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
@pytest.mark.parametrize("chunk", [8, 1000, 1 << 20])
def test_pieces_of_any_size(
    rows: int, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of products, of the weights and of differences, which are cut at different places."""
    monkeypatch.setattr("wanx.checkpoints.lora.patches._ROWS", rows)
    weights = weights_of(tmp_path / "dit.safetensors")
    layer, other = "blocks.0.ffn.0", "blocks.1.ffn.2"
    pairs = low_rank(3, [layer, other])
    difference = torch.randn(shapes()[f"{layer}.weight"]) * 0.1
    tensors = {f"diffusion_model.{layer}.diff": difference}
    for name, (up, down) in pairs.items():
        tensors[f"diffusion_model.{name}.lora_up.weight"] = up
        tensors[f"diffusion_model.{name}.lora_down.weight"] = down
    save_file(tensors, tmp_path / "lora.safetensors")
    lora = Lora(path=tmp_path / "lora.safetensors", strength=0.5)
    once, _ = fuse(weights, [lora])
    twice, _ = fuse(once, [lora])  # on weights that are fused already
    for fused, factor in ((once, 0.5), (twice, 1.0)):
        for name, (up, down) in pairs.items():
            source = fused.tensors[f"{name}.weight"]
            data = b"".join(bytes(piece) for piece in source.iter_converted("F32", chunk))
            found = torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(source.shape)
            expected = formula(numbers(weights.tensors[f"{name}.weight"]), up, down, factor)
            if name == layer:
                expected += factor * difference.double()
            assert torch.allclose(found, expected.float(), rtol=2e-7, atol=1e-9)


def test_a_source_that_is_left_early(tmp_path: Path) -> None:
    """No thread stays behind where an export is stopped in the middle of a tensor."""
    weights = weights_of(tmp_path / "dit.safetensors")
    ((up, down),) = low_rank(3, ["blocks.0.ffn.0"]).values()
    names = {"lora_up.weight": up, "lora_down.weight": down}
    save_file(
        {f"diffusion_model.blocks.0.ffn.0.{name}": t for name, t in names.items()},
        tmp_path / "lora.safetensors",
    )
    fused, _ = fuse(weights, [Lora(path=tmp_path / "lora.safetensors")])
    before = threading.active_count()
    pieces = fused.tensors["blocks.0.ffn.0.weight"].iter_converted("F32", 64)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert threading.active_count() <= before
