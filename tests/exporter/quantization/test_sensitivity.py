"""Noise of 8-bit layers and attentions against float64 by hand, and which of them stay high."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.support.small_models import load_dit, record_inputs, small_model
from wanx.bundle.golden_steps import Golden, GoldenStep
from wanx.checkpoints.checkpoint import Checkpoint
from wanx.errors import WanxError
from wanx.exporter.calibration.blockwise_dit import BlockwiseDiT
from wanx.exporter.calibration.observers import Observers
from wanx.exporter.calibration.options import CalibrationOptions
from wanx.exporter.quantization.choose_recipe import choose_recipe
from wanx.exporter.quantization.recipe import Recipe, dit_candidates, shared_input, smoothing_of
from wanx.exporter.quantization.scheme import SCHEMES, QuantizeOptions
from wanx.exporter.quantization.sensitivity import select_layers
from wanx.models.dit.model import WanDiT
from wanx.progress import no_progress

LENGTHS = (37, 300)  # the second is longer than what is compared of it
ANY = -1000.0  # a gate that every layer passes
ATTENTIONS = frozenset(f"blocks.{i}.self_attn.attend" for i in range(2))
Change = Callable[[dict[str, Tensor]], object]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network, recorded steps, and what its linears were given in them."""

    checkpoint: Checkpoint
    dit: WanDiT
    golden: Golden
    seen: Mapping[str, list[Tensor]]
    observers: Observers

    def decide(
        self,
        scheme: str,
        options: QuantizeOptions,
        attentions: frozenset[str] = frozenset(),
        only: list[str] | None = None,
    ) -> Recipe:
        candidates = dit_candidates(self.checkpoint.config.dit, options)
        if only is not None:
            candidates = only, {}
        streamed = BlockwiseDiT(
            self.checkpoint.config.dit, self.checkpoint.components["dit"].tensors
        )
        return select_layers(
            streamed, self.golden, self.observers, SCHEMES[scheme], options, candidates, attentions
        )


def make_case(folder: Path, change: Change | None = None) -> Case:
    checkpoint, _ = small_model(folder, change=change)
    config = checkpoint.config.dit
    generator = np.random.default_rng(0)
    length = LENGTHS[1]
    angles = generator.standard_normal((length, config.head_dim // 2), dtype=np.float32)
    context = generator.standard_normal((1, config.text_len, config.text_dim), dtype=np.float32)
    steps = tuple(
        GoldenStep(
            step=number,
            tokens=generator.standard_normal((1, length, config.token_dim), dtype=np.float32),
            timestep=np.array([timestep], np.float32),
            velocities=dict.fromkeys(("conditional", "unconditional"), np.zeros(1)),
        )
        for number, timestep in ((1, 900), (4, 100))
    )
    golden = Golden(
        run={},
        constants={"rope_cos": np.cos(angles), "rope_sin": np.sin(angles)},
        contexts={"conditional": context, "unconditional": context[:, ::-1].copy() / 3},
        steps=steps,
    )
    dit = load_dit(checkpoint)
    seen = record_inputs(dit)
    for _, _, feeds in golden.samples():
        dit(**{name: torch.from_numpy(value) for name, value in feeds.items()})
    observers = Observers()
    for name, inputs in seen.items():
        for x in inputs:
            observers.observe(name, x)
    return Case(checkpoint=checkpoint, dit=dit, golden=golden, seen=seen, observers=observers)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("case"))


def e4m3(x: Tensor) -> Tensor:
    """The nearest numbers of E4M3, ties to even: 3 bits of mantissa, and no exponent below -6."""
    exponent = torch.frexp(x.abs().clamp_min(2.0**-6))[1] - 1
    step = torch.ldexp(torch.ones_like(x), exponent - 3)
    return ((x / step).round() * step).clamp(-448, 448)


def eight_bits(x: Tensor, scale: Tensor | float, scheme: str) -> Tensor:
    if scheme == "int8":
        return (x / scale).round().clamp(-128, 127) * scale
    return e4m3(x / scale) * scale


def rows_of(x: Tensor) -> Tensor:
    """At most 128 rows, evenly spread."""
    length = x.shape[1]
    return x[:, np.rint(np.linspace(0, length - 1, min(length, 128))).astype(int)]


def sqnr_db(pairs: list[tuple[Tensor, Tensor]]) -> float:
    signal = sum(float(exact.square().sum()) for exact, _ in pairs)
    noise = sum(float((exact - rough).square().sum()) for exact, rough in pairs)
    return 10 * math.log10(signal / noise)


def by_hand(
    case: Case, name: str, scheme: str, options: QuantizeOptions
) -> tuple[float, float | None]:
    """SQNR and static input scale of one layer, in float64."""
    limit = {"int8": 127, "fp8": 448}[scheme]
    layer = case.dit.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    weight, bias = layer.weight.double(), layer.bias.double()
    inputs = [x.double() for x in case.seen[name]]
    vector = torch.ones(weight.shape[1], dtype=torch.float64)
    smoothed = name.endswith(("self_attn.q", "self_attn.k", "self_attn.v", "ffn.0"))
    if options.smooth and smoothed:
        prefix = name.rpartition(".")[0]
        group = [name] if name.endswith("ffn.0") else [f"{prefix}.{letter}" for letter in "qkv"]
        columns = [case.dit.get_submodule(member).weight.abs().amax(0) for member in group]
        largest = torch.stack(columns).amax(0).double()
        seen = torch.cat([x.flatten(0, -2) for x in inputs]).abs().amax(0)
        vector = seen**options.smooth / largest ** (1 - options.smooth)
    scaled = weight * vector
    amax = scaled.abs().amax() if options.weight_scale == "tensor" else scaled.abs().amax(1)
    scaled = eight_bits(scaled, (amax / limit).reshape(-1, 1), scheme)
    everything = torch.cat([(x / vector).flatten() for x in inputs]).abs()
    step: Any = float(everything.max()) / limit
    if options.percentile < 100 and not (options.smooth and smoothed):
        step = case.observers[name].percentile(options.percentile) / limit
    pairs = []
    for x in map(rows_of, inputs):
        scale = step
        if options.activation_scale == "dynamic":
            scale = (x / vector).abs().amax(-1, keepdim=True) / limit
        rough = eight_bits(x / vector, scale, scheme) @ scaled.T + bias
        pairs.append((x @ weight.T + bias, rough))
    return sqnr_db(pairs), None if options.activation_scale == "dynamic" else step


@pytest.mark.parametrize(
    ("scheme", "changes"),
    [
        ("int8", {}),
        ("int8", {"smooth": 0.5}),
        ("int8", {"smooth": 0.8}),
        ("int8", {"percentile": 99.0}),
        ("fp8", {}),
        ("fp8", {"weight_scale": "tensor"}),
        ("fp8", {"activation_scale": "dynamic"}),
        ("fp8", {"activation_scale": "dynamic", "weight_scale": "tensor", "smooth": 0.5}),
        ("fp8", {"smooth": 0.3, "percentile": 99.9}),
    ],
)
def test_noise_of_every_layer(scheme: str, changes: dict[str, Any], case: Case) -> None:
    options = QuantizeOptions(layer_gate_db=ANY, **changes)
    recipe = case.decide(scheme, options)
    wanted, _ = dit_candidates(case.checkpoint.config.dit, options)
    assert list(recipe.layers) == wanted
    assert recipe.sqnr_db.keys() == recipe.layers.keys()
    for name, found in recipe.layers.items():
        expected, scale = by_hand(case, name, scheme, options)
        assert recipe.sqnr_db[name] == pytest.approx(expected, abs=0.1), name
        assert found == (None if scale is None else pytest.approx(scale, rel=1e-5)), name
        assert found == recipe.layers[shared_input(name)]


def test_smoothing_vectors(case: Case) -> None:
    """Their place in the network, and that they balance what they shall (Xiao et al., eq. 4)."""
    assert case.decide("int8", QuantizeOptions(layer_gate_db=ANY)).smooth == {}
    smooth = case.decide("int8", QuantizeOptions(layer_gate_db=ANY, smooth=0.5)).smooth
    assert smooth.keys() == {f"blocks.{i}.{a}_smooth" for i in range(2) for a in ("attn", "ffn")}
    for block in ("blocks.0", "blocks.1"):
        seen = torch.cat([x[0] for x in case.seen[f"{block}.ffn.0"]]).abs().amax(0)
        columns = case.dit.get_submodule(f"{block}.ffn.0").weight.abs().amax(0)
        vector = smooth[f"{block}.ffn_smooth"]
        # At a half, inputs and weights have the same range in every channel.
        assert torch.allclose(seen / vector, columns * vector, rtol=1e-4)


def test_noise_of_attention(case: Case) -> None:
    options = QuantizeOptions(layer_gate_db=ANY, attention="fp8")
    recipe = case.decide("fp8", options, ATTENTIONS)
    assert recipe.attention.keys() == ATTENTIONS
    heads = case.checkpoint.config.dit.num_heads
    for name in ATTENTIONS:
        steps, operands = [], []
        for letter in "qkv":
            inputs = [x.double() for x in case.seen[f"{name}.{letter}"]]
            steps.append(max(float(x.abs().max()) for x in inputs) / 448)
            operands.append(inputs)
        assert recipe.attention[name] == pytest.approx(steps, rel=1e-5)
        pairs = []
        for q, k, v in zip(*operands, strict=True):
            parts = rows_of(q), k, v
            rounded = [eight_bits(x, step, "fp8") for x, step in zip(parts, steps, strict=True)]
            pairs.append((attend(*parts, heads), attend(*rounded, heads, rounded=True)))
        assert recipe.sqnr_db[name] == pytest.approx(sqnr_db(pairs), abs=0.1)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, *, rounded: bool = False) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)
    if rounded:
        weights = eight_bits(weights, 1 / 448, "fp8")
    return (weights @ v).transpose(1, 2).flatten(-2)


def outlier_channel(weights: dict[str, Tensor]) -> None:
    """One input of q, k and v is a thousand times the others, and counts as much as they."""
    weights["time_projection.1.weight"] *= 0.05
    weights["blocks.0.modulation"][0, 0, 7] = 300
    for letter in "qkv":
        weights[f"blocks.0.self_attn.{letter}.weight"][:, 7] *= 0.003


@pytest.fixture(scope="module")
def outlier(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("outlier"), outlier_channel)


QKV = {f"blocks.0.self_attn.{letter}" for letter in "qkv"}


def test_a_layer_with_an_outlier_channel_stays_high(outlier: Case) -> None:
    recipe = outlier.decide("int8", QuantizeOptions())
    assert outlier.observers["blocks.0.self_attn.q"].outliers().worst == 7
    assert recipe.unquantized_layers.keys() == QKV
    for name in QKV:
        assert recipe.unquantized_layers[name] == f"SQNR {recipe.sqnr_db[name]:.1f} dB, below 24"
        assert recipe.sqnr_db[name] < 20
    assert recipe.layers.keys() | QKV == set(
        dit_candidates(outlier.checkpoint.config.dit, QuantizeOptions())[0]
    )
    assert not recipe.is_repeated("blocks", 2)


def test_smoothing_rescues_it(outlier: Case) -> None:
    plain = outlier.decide("int8", QuantizeOptions())
    recipe = outlier.decide("int8", QuantizeOptions(smooth=0.5))
    assert recipe.unquantized_layers == {}
    assert recipe.is_repeated("blocks", 2)
    for name in QKV:
        assert recipe.sqnr_db[name] > max(24, plain.sqnr_db[name] + 10)


def test_the_gate_is_the_users(outlier: Case) -> None:
    everything = outlier.decide("int8", QuantizeOptions(layer_gate_db=ANY))
    assert everything.unquantized_layers == {}
    gate = sorted(everything.sqnr_db.values())[15] - 0.01
    recipe = outlier.decide("int8", QuantizeOptions(layer_gate_db=gate))
    low = {name for name, value in everything.sqnr_db.items() if value < gate}
    assert len(low) == 15
    assert recipe.unquantized_layers == {
        name: f"SQNR {everything.sqnr_db[name]:.1f} dB, below {gate:g}" for name in low
    }
    assert recipe.layers == {n: s for n, s in everything.layers.items() if n not in low}
    assert recipe.sqnr_db == everything.sqnr_db


def test_what_was_kept_before_stays_kept(outlier: Case) -> None:
    recipe = outlier.decide(
        "int8", QuantizeOptions(skip_layers=("*.ffn.2", "blocks.0.self_attn.v"))
    )
    assert (
        recipe.unquantized_layers["blocks.1.ffn.2"]
        == recipe.unquantized_layers["blocks.0.self_attn.v"]
        == "--skip-layers"
    )
    assert recipe.unquantized_layers["blocks.0.self_attn.q"].startswith("SQNR")
    assert "blocks.0.self_attn.v" not in recipe.sqnr_db


def test_a_smoothed_group_falls_back_together(case: Case) -> None:
    options = QuantizeOptions(smooth=0.5, layer_gate_db=ANY)
    sqnr = case.decide("int8", options).sqnr_db
    group = [f"blocks.0.self_attn.{letter}" for letter in "qkv"]
    worst, second, best = sorted(group, key=lambda name: sqnr[name])
    gate = (sqnr[worst] + sqnr[second]) / 2
    recipe = case.decide("int8", replace(options, layer_gate_db=gate))
    assert recipe.unquantized_layers[worst] == f"SQNR {sqnr[worst]:.1f} dB, below {gate:g}"
    for partner in (second, best):
        assert sqnr[partner] > gate
        assert recipe.unquantized_layers[partner] == "shares a smoothed input with one that failed"
    failed = {smoothing_of(name) for name in recipe.unquantized_layers}
    assert "blocks.0.attn_smooth" in failed
    left = {vector for name in recipe.layers if (vector := smoothing_of(name))}
    assert recipe.smooth.keys() == left
    assert left.isdisjoint(failed)


def test_a_group_with_a_layer_kept_high_is_not_smoothed(case: Case) -> None:
    options = QuantizeOptions(smooth=0.5, layer_gate_db=ANY, skip_layers=("blocks.0.self_attn.v",))
    recipe = case.decide("int8", options)
    assert "blocks.0.attn_smooth" not in recipe.smooth
    assert "blocks.1.attn_smooth" in recipe.smooth
    plain = case.decide("int8", QuantizeOptions(layer_gate_db=ANY))
    for name in ("blocks.0.self_attn.q", "blocks.0.self_attn.k"):
        assert recipe.layers[name] == plain.layers[name]
        assert recipe.sqnr_db[name] == plain.sqnr_db[name]


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_no_layer_left(scheme: str, case: Case) -> None:
    sqnr = case.decide(scheme, QuantizeOptions(layer_gate_db=ANY)).sqnr_db
    best = max(sqnr, key=lambda name: sqnr[name])
    with pytest.raises(WanxError) as caught:
        case.decide(scheme, QuantizeOptions(layer_gate_db=150))
    assert type(caught.value) is WanxError
    message = str(caught.value)
    assert f"no layer can be {scheme}: below 150 dB" in message
    assert f"best: {best} with {sqnr[best]:.1f} dB" in message
    assert "\n" not in message


def test_attentions_do_not_count_as_layers(outlier: Case) -> None:
    """One passes, but nothing would be left to run in 8 bits around it."""
    options = QuantizeOptions(layer_gate_db=ANY, attention="fp8", weight_scale="tensor")
    sqnr = outlier.decide("fp8", options, ATTENTIONS).sqnr_db
    low = min((name for name in sqnr if name not in ATTENTIONS), key=lambda name: sqnr[name])
    gate = sqnr[low] + 0.01
    assert any(sqnr[name] > gate for name in ATTENTIONS)
    with pytest.raises(WanxError, match=f"best: {low} with"):
        outlier.decide("fp8", replace(options, layer_gate_db=gate), ATTENTIONS, only=[low])


def test_an_attention_falls_back_alone(case: Case) -> None:
    options = QuantizeOptions(layer_gate_db=ANY, attention="fp8")
    sqnr = case.decide("fp8", options, ATTENTIONS).sqnr_db
    worst, best = sorted(ATTENTIONS, key=lambda name: sqnr[name])
    gate = (sqnr[worst] + sqnr[best]) / 2
    recipe = case.decide("fp8", replace(options, layer_gate_db=gate), ATTENTIONS)
    assert recipe.attention.keys() == {best}
    assert recipe.unquantized_layers[worst] == f"SQNR {sqnr[worst]:.1f} dB, below {gate:g}"
    assert recipe.layers


def dead_norm(weights: dict[str, Tensor]) -> None:
    weights["blocks.1.norm3.weight"].zero_()
    weights["blocks.1.norm3.bias"].zero_()


def dead_modulation(weights: dict[str, Tensor]) -> None:
    """The inputs of q, k and v, and of the ffn, are always 0."""
    weights["time_projection.1.weight"].zero_()
    weights["time_projection.1.bias"].zero_()
    weights["blocks.1.modulation"][0, :] = torch.tensor([0, -1, 1, 0, -1, 1])[:, None]


@pytest.mark.parametrize("options", [{}, {"smooth": 0.5}, {"percentile": 99.0}])
@pytest.mark.parametrize(
    ("change", "layers"),
    [
        (dead_norm, ["cross_attn.q"]),
        (dead_modulation, ["self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "ffn.0"]),
    ],
)
def test_an_input_that_is_always_zero(
    change: Change, layers: list[str], options: dict[str, Any], tmp_path: Path
) -> None:
    """Following what the error says, layer by layer, leads to a recipe."""
    case = make_case(tmp_path, change)
    kept: list[str] = []
    while len(kept) < len(layers) + 1:
        try:
            chosen = QuantizeOptions(skip_layers=tuple(kept), layer_gate_db=ANY, **options)
            recipe = case.decide("int8", chosen)
            break
        except WanxError as error:
            message, _, layer = str(error).partition("--skip-layers ")
            assert "was always 0 while calibrating" in message
            assert layer not in kept
            assert f"the input of {layer}" in message
            kept.append(layer)
    assert set(kept) >= {f"blocks.1.{layer}" for layer in layers if layer != "self_attn.o"}
    assert set(recipe.layers).isdisjoint(kept)


def test_an_input_that_was_never_seen(case: Case) -> None:
    lost = "blocks.1.self_attn.q"
    observers = Observers()
    observers.points = {n: p for n, p in case.observers.points.items() if n != lost}
    for options in ({}, {"smooth": 0.5}):
        with pytest.raises(WanxError, match=f"nothing was seen at the input of {lost}"):
            replace(case, observers=observers).decide("int8", QuantizeOptions(**options))
    observers.points.pop(lost, None)
    dynamic = QuantizeOptions(activation_scale="dynamic", layer_gate_db=ANY)
    assert replace(case, observers=observers).decide("fp8", dynamic).layers[lost] is None


def test_progress_counts_blocks(case: Case) -> None:
    told: list[tuple[int, int]] = []
    streamed = BlockwiseDiT(case.checkpoint.config.dit, case.checkpoint.components["dit"].tensors)
    select_layers(
        streamed, case.golden, case.observers, SCHEMES["int8"], QuantizeOptions(layer_gate_db=ANY),
        (["blocks.0.ffn.0"], {}), on_block=lambda *numbers: told.append(numbers),
    )  # fmt: skip
    assert told == [(1, 2), (2, 2)]


def test_choosing_again_measures_nothing_that_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One calibration serves every scheme and option; one measurement each of them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checkpoint, bundle = small_model(tmp_path / "model")
    calibration = CalibrationOptions(
        prompts=1, steps=2, width=32, height=32, frames=5, golden_steps=0
    )
    runs: list[int] = []
    run = BlockwiseDiT.run
    monkeypatch.setattr(
        BlockwiseDiT, "run", lambda self, *a, **k: runs.append(1) or run(self, *a, **k)
    )

    def choose(scheme: str, **options: Any) -> tuple[Recipe, Golden, int]:
        fresh = options.pop("fresh", False)
        before = len(runs)
        recipe, golden = choose_recipe(
            checkpoint, bundle, SCHEMES[scheme], QuantizeOptions(layer_gate_db=ANY, **options),
            replace(calibration, fresh=fresh), no_progress,
        )  # fmt: skip
        return recipe, golden, len(runs) - before

    first, golden, count = choose("int8")
    assert count == 2 + 1
    assert [step.step for step in golden.steps] == [1]
    again, _, count = choose("int8")
    assert count == 0
    assert again == first
    for scheme, options in (
        ("fp8", {}),
        ("fp8", {"attention": "fp8", "smooth": 0.5}),
        ("int8", {"smooth": 0.5}),
        ("int8", {"skip_layers": ("blocks.0.*",)}),
        ("int8", {"percentile": 99.0}),
    ):
        recipe, _, count = choose(scheme, **options)
        assert count == 1
        known, _, count = choose(scheme, **options)
        assert count == 0
        assert replace(known, smooth={}) == replace(recipe, smooth={})
        assert all(torch.equal(known.smooth[name], recipe.smooth[name]) for name in recipe.smooth)
    recipe, _, count = choose("int8", fresh=True)
    assert count == 2 + 1
    assert recipe == first
