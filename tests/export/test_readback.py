"""Faults planted into real exports of the built-in model; none of them may be published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults as plant
import pytest
import torch
from eightbit import trace_once
from faults import Fault, every

from wanx.benchmarks.comparison import Gates
from wanx.benchmarks.golden import check_golden, require_golden
from wanx.builtin import builtin_bundle
from wanx.bundle import Bundle
from wanx.errors import GateError, WanxError
from wanx.export import exporter
from wanx.export.calibration_options import CalibrationOptions
from wanx.export.components import dit_spec, text_encoder_spec
from wanx.export.options import ExportOptions
from wanx.export.readback import eight_bit_layers
from wanx.export.scheme import QuantizeOptions

CALIBRATION = CalibrationOptions(prompts=1, steps=2, golden_steps=2, width=32, height=32, frames=5)
LAYERS = [
    *(f"{attention}.{name}" for attention in ("self_attn", "cross_attn") for name in "qkvo"),
    "ffn.0", "ffn.2",
]  # fmt: skip
ALL = [name for layer in LAYERS for name in every(layer)]
FP8: dict[str, Any] = {"precision": "fp8"}
FP8_ALL: dict[str, Any] = FP8 | {"attention": "fp8", "weight_scale": "tensor"}
KEEP_O: dict[str, Any] = {"keep_high": ("*.cross_attn.o",)}

Export = Callable[..., Bundle]


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Export:
    """Export text encoder and denoiser, and no VAE; what was traced or calibrated is reused."""
    monkeypatch.setattr(
        exporter,
        "component_specs",
        lambda config: [text_encoder_spec(config.text_encoder), dit_spec(config.dit)],
    )
    monkeypatch.setattr(exporter, "trace", trace_once)

    def act(precision: str = "int8", *, gate: bool = False, **quantize: Any) -> Bundle:
        options = QuantizeOptions(layer_gate_db=0, smooth=0.5, **quantize)  # keeps all blocks alike
        return exporter.export(
            ExportOptions(
                output=tmp_path / "bundle",
                precision=precision,  # type: ignore[arg-type]
                quantize=options,
                calibration=CALIBRATION,
                gate=gate,
            )
        )

    return act


FAULTS: dict[str, tuple[Fault, dict[str, Any], tuple[str, ...]]] = {
    "a layer left high": (
        plant.another_recipe(plant.without("ffn.0")),
        {},
        tuple(f"{name}.weight is not 8-bit instead of int8" for name in every("ffn.0")),
    ),
    "a layer left high in the graph": (
        plant.edit_graph(plant.leave_high("blocks.3.ffn.2")),
        {},
        ("blocks.3.ffn.2.weight is int8-weight instead of int8",),
    ),
    "a layer left high in the files": (
        plant.another_recipe(plant.without("ffn.0"), graph=False),
        {},
        ("reads 12 tensors that were not written", "blocks.3.ffn.0.input_scale"),
    ),
    "a kept layer in 8 bits": (
        plant.another_recipe(plant.with_more("cross_attn.o")),
        KEEP_O,
        ("blocks.5.cross_attn.o.weight is int8 instead of not 8-bit",),
    ),
    "a kept layer in 8 bits in the graph": (
        plant.another_recipe(plant.with_more("cross_attn.o"), files=False),
        KEEP_O,
        ("reads 12 tensors that were not written", "blocks.3.cross_attn.o.weight_scale"),
    ),
    "a kept layer in 8 bits in the files": (
        plant.another_recipe(plant.with_more("cross_attn.o"), graph=False),
        KEEP_O,
        ("blocks.5.cross_attn.o.weight is int8-weight instead of not 8-bit",),
    ),
    "inputs that are not quantised": (
        plant.weight_only,
        {},
        ("blocks.0.cross_attn.k.weight is int8-weight instead of int8", "and 50 more"),
    ),
    "an input scale of twice the size": (
        plant.edit_scales(plant.only("blocks.2.ffn.2.input_scale", lambda scale: 2 * scale)),
        {},
        ("says: blocks.2.ffn.2.weight has the input scale ",),
    ),
    "a shared input scale of twice the size": (
        plant.edit_scales(plant.only("blocks.2.self_attn.q.input_scale", lambda scale: 2 * scale)),
        {},
        tuple(f"blocks.2.self_attn.{n}.weight has the input scale " for n in "qkv"),
    ),
    "input scales that are swapped": (
        plant.edit_scales(plant.swap("blocks.2.ffn.2.input_scale", "blocks.3.ffn.0.input_scale")),
        {},
        tuple(f"blocks.{n}.weight has the input scale " for n in ("2.ffn.2", "3.ffn.0")),
    ),
    "input scales that are swapped in the graph": (
        plant.edit_graph(
            plant.swap_readers("blocks.2.ffn.2.input_scale", "blocks.4.ffn.2.input_scale")
        ),
        {},
        tuple(f"blocks.{n}.ffn.2.weight has the input scale " for n in (2, 4)),
    ),
    "an input rounded by the scale of another": (
        plant.edit_graph(plant.quantise_by_another_scale),
        {},
        ("blocks.2.ffn.2.weight is int8 dynamic instead of int8",),
    ),
    "weight scales of twice the size": (
        plant.edit_scales(plant.change_every(".weight_scale", lambda scale: 2 * scale)),
        {},
        ("60 weights do not match their scales: ", "blocks.0.ffn.0.weight", "and 50 more"),
    ),
    "weight scales of half the size, fp8": (
        plant.edit_scales(plant.only("blocks.1.ffn.0.weight_scale", lambda scale: scale / 2)),
        FP8,
        ("1 weights do not match their scales: blocks.1.ffn.0.weight;",),
    ),
    "weight scales that are swapped": (
        plant.edit_scales(
            plant.swap("blocks.1.self_attn.k.weight_scale", "blocks.4.cross_attn.q.weight_scale")
        ),
        {},
        ("2 weights do not", "blocks.1.self_attn.k.weight", "blocks.4.cross_attn.q.weight"),
    ),
    "weight scales that are swapped, fp8": (
        plant.edit_scales(plant.swap("blocks.1.ffn.0.weight_scale", "blocks.2.ffn.0.weight_scale")),
        FP8,
        ("2 weights do not", "blocks.1.ffn.0.weight", "blocks.2.ffn.0.weight"),
    ),
    "weight scales that are swapped in the graph": (
        plant.edit_graph(
            plant.swap_readers("blocks.1.ffn.0.weight_scale", "blocks.2.ffn.0.weight_scale")
        ),
        {},
        ("blocks.1.ffn.0.weight is scaled by blocks.2.ffn.0.weight_scale instead of ",),
    ),
    "weight scales one row off": (
        plant.edit_scales(plant.change_every(".weight_scale", lambda scale: scale.roll(1))),
        {},
        ("60 weights do not match their scales: ",),
    ),
    "weight scales one row off, fp8": (
        plant.edit_scales(plant.only("blocks.5.ffn.2.weight_scale", lambda scale: scale.roll(-1))),
        FP8,
        ("1 weights do not match their scales: blocks.5.ffn.2.weight;",),
    ),
    "weight scales that are not numbers": (
        plant.edit_scales(
            plant.only("blocks.1.ffn.0.weight_scale", lambda scale: scale * torch.nan)
        ),
        {},
        ("1 weights do not match their scales: blocks.1.ffn.0.weight;",),
    ),
    "one scale where there is one per row": (
        plant.edit_scales(plant.only("blocks.1.ffn.0.weight_scale", lambda scale: scale.amax())),
        {},
        ("1 weights do not match their scales: blocks.1.ffn.0.weight;",),
    ),
    "a scale per tensor that is none": (
        plant.edit_scales(
            plant.only("blocks.1.ffn.0.weight_scale", lambda scale: scale * torch.nan)
        ),
        FP8_ALL,
        ("1 weights do not match their scales: blocks.1.ffn.0.weight;",),
    ),
    "fp8 built as int8": (
        plant.another_recipe(plant.as_int8),
        FP8,
        ("blocks.0.cross_attn.k.weight is int8 instead of fp8", "and 50 more"),
    ),
    "fp8 stored as int8": (
        plant.another_recipe(plant.as_int8, graph=False),
        FP8,
        ("blocks.0.cross_attn.k.weight is int8", "instead of fp8", "and 50 more"),
    ),
    "static scales built as dynamic": (
        plant.another_recipe(plant.dynamic),
        FP8,
        ("blocks.0.cross_attn.k.weight is fp8 dynamic instead of fp8", "and 50 more"),
    ),
    "an engine with swapped input scales": (
        plant.edit_graph(
            plant.swap_readers("blocks.2.ffn.2.input_scale", "blocks.4.ffn.2.input_scale"),
            engine=True,
        ),
        {},
        tuple(f"blocks.{n}.ffn.2.weight has the input scale " for n in (2, 4)),
    ),
    "an engine with swapped weight scales": (
        plant.edit_graph(
            plant.swap_readers("blocks.1.ffn.0.weight_scale", "blocks.2.ffn.0.weight_scale"),
            engine=True,
        ),
        {},
        ("blocks.1.ffn.0.weight is scaled by blocks.2.ffn.0.weight_scale instead of ",),
    ),
    "an engine with an input rounded by the scale of another": (
        plant.edit_graph(plant.quantise_by_another_scale, engine=True),
        {},
        ("blocks.2.ffn.2.weight is int8 dynamic instead of int8",),
    ),
    "an engine with a layer left high": (
        plant.edit_graph(plant.leave_high("blocks.3.ffn.2"), engine=True),
        {},
        ("blocks.3.ffn.2.weight is not 8-bit instead of int8",),
    ),
    "layers that are not run as integers": (
        plant.signed_activations,
        {},
        ("ONNX Runtime ran ", " of the 60 8-bit layers of dit as integer products"),
    ),
    "weights that are zero": (
        plant.edit_numbers(plant.zeros),
        {},
        ("60 weights do not match their scales: ",),
    ),
    "weights that are zero, per tensor": (
        plant.edit_numbers(plant.zeros_of_a_huge_scale),
        FP8_ALL,
        ("60 weights do not match their scales: blocks.0.cross_attn.k.weight",),
    ),
    "weights rounded down": (
        plant.edit_numbers(plant.floored),
        {},
        ("60 weights do not match their scales: ",),
    ),
    "weights rounded toward zero": (
        plant.edit_numbers(plant.toward_zero),
        {},
        ("60 weights do not match their scales: ",),
    ),
    "weights rounded toward zero, fp8": (
        plant.edit_numbers(plant.toward_zero),
        FP8,
        ("60 weights do not match their scales: ",),
    ),
    "weights of seven bits": (
        plant.edit_numbers(plant.half_the_range),
        {},
        ("60 weights do not match their scales: ",),
    ),
    "one number two steps off": (
        plant.edit_numbers(plant.one_wrong_number),
        {},
        ("1 weights do not match their scales: blocks.4.ffn.0.weight;",),
    ),
    "one number that is none": (
        plant.edit_numbers(plant.one_nan),
        FP8_ALL,
        ("1 weights do not match their scales: blocks.4.ffn.0.weight;",),
    ),
    "weights that are not smoothed": (
        plant.unsmoothed_weights,
        {},
        ("24 weights do not match their scales: blocks.0.ffn.0.weight, blocks.0.self_attn.k",),
    ),
    "smoothing vectors that are swapped": (
        plant.edit_scales(plant.swap("blocks.1.attn_smooth", "blocks.1.ffn_smooth")),
        {},
        ("2 smoothing vectors ", "blocks.1.attn_smooth, blocks.1.ffn_smooth"),
    ),
    "attention left high": (
        plant.another_recipe(plant.high_attention),
        FP8_ALL,
        ("blocks.0.self_attn.attend is not 8-bit instead of fp8 attention",),
    ),
    "attention scales that are swapped": (
        plant.edit_scales(
            plant.swap("blocks.1.self_attn.attend.q_scale", "blocks.1.self_attn.attend.v_scale")
        ),
        FP8_ALL,
        ("blocks.1.self_attn.attend has the input scale ",),
    ),
    "attention scales that are swapped in the graph": (
        plant.edit_graph(
            plant.swap_readers(
                "blocks.1.self_attn.attend.q_scale", "blocks.1.self_attn.attend.k_scale"
            )
        ),
        FP8_ALL,
        ("blocks.1.self_attn.attend has the input scale ",),
    ),
    "a text encoder without a scale": (
        plant.edit_graph(plant.leave_high("blocks.1.ffn.fc1", place=1), "text_encoder"),
        {},
        ("text_encoder was", "blocks.1.ffn.fc1.weight is scaled by nothing instead of "),
    ),
    "a table without scales": (
        plant.edit_graph(plant.ignore_rows, "text_encoder"),
        {},
        ("token_embedding.weight is scaled by nothing instead of token_embedding.weight_scale",),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_stops_the_export(
    fault: str, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    act, options, words = FAULTS[fault]
    act(monkeypatch)
    with pytest.raises(WanxError) as caught:
        export(**options)
    message = str(caught.value)
    assert type(caught.value) is WanxError
    assert "\n" not in message
    assert all(word in message for word in words), message
    assert list(tmp_path.iterdir()) == []


SOUND: dict[str, tuple[dict[str, Any], str]] = {
    "int8": ({}, "int8"),
    "fp8": (FP8, "fp8"),
    "fp8, everything": (FP8_ALL, "fp8"),
    "dynamic": (FP8 | {"activation_scale": "dynamic"}, "fp8 dynamic"),
}


@pytest.mark.parametrize("case", SOUND)
def test_what_is_read_back(case: str, export: Export) -> None:
    options, kind = SOUND[case]
    bundle = export(gate=True, **options)
    dit, text = (bundle.manifest.components[name] for name in ("dit", "text_encoder"))
    assert dit.quantization is not None
    assert text.quantization is not None
    found = {f"{name}.weight": kind for name in ALL}
    heads = (
        dict.fromkeys(every("self_attn.attend"), "fp8 attention") if "attention" in options else {}
    )
    for graph in (dit.graph, *dit.engines.values()):
        assert eight_bit_layers(bundle.root / graph, bundle.root) == found | heads
    assert dit.quantization.found == {kind: 60} | ({"fp8 attention": 6} if heads else {})
    assert dit.quantization.layers.keys() == set(ALL)
    assert text.quantization.found == {"int8-weight": 15}
    if kind == "int8":
        assert dit.quantization.kernels["MatMulIntegerToFloat"] == 60
    for graph in (text.graph, *text.engines.values()):
        kinds = eight_bit_layers(bundle.root / graph, bundle.root)
        assert kinds == dict.fromkeys(
            [f"{n}.weight" for n in text.quantization.layers], "int8-weight"
        )


def test_a_graph_of_wide_weights_has_no_8_bit_layers() -> None:
    root = builtin_bundle("tiny")
    for graph in root.rglob("*.onnx"):
        assert eight_bit_layers(graph, root) == {}


# What multiplies the right 8-bit numbers in every layer, and is another network all the same.
UNSEEN: dict[str, tuple[Fault, dict[str, Any]]] = {
    "no GELU": (plant.edit_graph(plant.drop_gelu), {}),
    "biases of another layer": (plant.edit_graph(plant.another_bias), {}),
    "shift for scale": (plant.edit_graph(plant.swap_modulation), {}),
    "inputs that are not smoothed": (plant.edit_graph(plant.ignore_smoothing), {}),
    "an engine without GELU": (plant.edit_graph(plant.drop_gelu, engine=True), {}),
}


@pytest.mark.parametrize("fault", UNSEEN)
def test_golden_steps_see_what_reading_back_cannot(
    fault: str, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    act, options = UNSEEN[fault]
    act(monkeypatch)
    bundle = export(**options)
    assert bundle.manifest.components["dit"].quantization.found == {"int8": 60}
    with pytest.raises(
        GateError, match=r"4 of 4 golden steps are below the gate: cosine 0\."
    ) as caught:
        require_golden(check_golden(bundle, threads=1), Gates())
    assert "\n" not in str(caught.value)


def test_the_gate_stops_the_export(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant.edit_graph(plant.drop_gelu)(monkeypatch)
    with pytest.raises(GateError, match="golden steps are below the gate"):
        export(gate=True)
    assert list(tmp_path.iterdir()) == []
