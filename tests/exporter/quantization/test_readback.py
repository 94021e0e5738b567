"""Graphs of the wrong kind planted into real exports of the built-in model; none is published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import faults, graph_faults
from tests.support.faults import Export, Fault, every
from wanx.accuracy.gates import Gates
from wanx.accuracy.golden_check import check_golden, require_golden
from wanx.builtin import builtin_bundle
from wanx.errors import GateError
from wanx.exporter.quantization.readback import eight_bit_layers

LAYERS = [
    *(f"{attention}.{name}" for attention in ("self_attn", "cross_attn") for name in "qkvo"),
    "ffn.0", "ffn.2",
]  # fmt: skip
ALL = [name for layer in LAYERS for name in every(layer)]
KEEP_O: dict[str, Any] = {"skip_layers": ("*.cross_attn.o",)}


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Export:
    return faults.exporter_of(tmp_path, monkeypatch)


FAULTS: dict[str, faults.Case] = {
    "a layer left high": (
        faults.another_recipe(faults.without("ffn.0")),
        {},
        tuple(f"{name}.weight is not 8-bit instead of int8" for name in every("ffn.0")),
    ),
    "a layer left high in the graph": (
        graph_faults.edit_graph(graph_faults.leave_high("blocks.3.ffn.2")),
        {},
        ("blocks.3.ffn.2.weight is int8-weight instead of int8",),
    ),
    "a layer left high in the files": (
        faults.another_recipe(faults.without("ffn.0"), graph=False),
        {},
        ("dit reads tensors that were not written: ", "blocks.3.ffn.0.input_scale"),
    ),
    "a kept layer in 8 bits": (
        faults.another_recipe(faults.with_more("cross_attn.o")),
        KEEP_O,
        ("blocks.5.cross_attn.o.weight is int8 instead of not 8-bit",),
    ),
    "a kept layer in 8 bits in the graph": (
        faults.another_recipe(faults.with_more("cross_attn.o"), files=False),
        KEEP_O,
        ("dit reads tensors that were not written: ", "blocks.3.cross_attn.o.weight_scale"),
    ),
    "inputs that are not quantised": (
        graph_faults.weight_only,
        {},
        ("blocks.0.cross_attn.k.weight is int8-weight instead of int8", "and 50 more"),
    ),
    "an input scale of twice the size": (
        faults.edit_scales(faults.only("blocks.2.ffn.2.input_scale", lambda scale: 2 * scale)),
        {},
        ("says: blocks.2.ffn.2.weight has the input scale ",),
    ),
    "a shared input scale of twice the size": (
        faults.edit_scales(
            faults.only("blocks.2.self_attn.q.input_scale", lambda scale: 2 * scale)
        ),
        {},
        tuple(f"blocks.2.self_attn.{n}.weight has the input scale " for n in "qkv"),
    ),
    "input scales that are swapped": (
        faults.edit_scales(faults.swap("blocks.2.ffn.2.input_scale", "blocks.3.ffn.0.input_scale")),
        {},
        tuple(f"blocks.{n}.weight has the input scale " for n in ("2.ffn.2", "3.ffn.0")),
    ),
    "input scales that are swapped in the graph": (
        graph_faults.edit_graph(
            graph_faults.swap_readers("blocks.2.ffn.2.input_scale", "blocks.4.ffn.2.input_scale")
        ),
        {},
        tuple(f"blocks.{n}.ffn.2.weight has the input scale " for n in (2, 4)),
    ),
    "an input rounded by the scale of another": (
        graph_faults.edit_graph(graph_faults.quantise_by_another_scale),
        {},
        ("blocks.2.ffn.2.weight is int8 dynamic instead of int8",),
    ),
    "weight scales that are swapped in the graph": (
        graph_faults.edit_graph(
            graph_faults.swap_readers("blocks.1.ffn.0.weight_scale", "blocks.2.ffn.0.weight_scale")
        ),
        {},
        ("blocks.1.ffn.0.weight is scaled by blocks.2.ffn.0.weight_scale instead of ",),
    ),
    "fp8 built as int8": (
        faults.another_recipe(faults.as_int8),
        faults.FP8,
        ("blocks.0.cross_attn.k.weight is int8 instead of fp8", "and 50 more"),
    ),
    "fp8 stored as int8": (
        faults.another_recipe(faults.as_int8, graph=False),
        faults.FP8,
        ("blocks.0.cross_attn.k.weight is int8", "instead of fp8", "and 50 more"),
    ),
    "static scales built as dynamic": (
        faults.another_recipe(faults.dynamic),
        faults.PER_TENSOR,
        ("blocks.0.cross_attn.k.weight is fp8 dynamic instead of fp8", "and 50 more"),
    ),
    "an engine with swapped input scales": (
        graph_faults.edit_graph(
            graph_faults.swap_readers("blocks.2.ffn.2.input_scale", "blocks.4.ffn.2.input_scale"),
            engine=True,
        ),
        {},
        tuple(f"blocks.{n}.ffn.2.weight has the input scale " for n in (2, 4)),
    ),
    "an engine with swapped weight scales": (
        graph_faults.edit_graph(
            graph_faults.swap_readers("blocks.1.ffn.0.weight_scale", "blocks.2.ffn.0.weight_scale"),
            engine=True,
        ),
        {},
        ("blocks.1.ffn.0.weight is scaled by blocks.2.ffn.0.weight_scale instead of ",),
    ),
    "an engine with an input rounded by the scale of another": (
        graph_faults.edit_graph(graph_faults.quantise_by_another_scale, engine=True),
        {},
        ("blocks.2.ffn.2.weight is int8 dynamic instead of int8",),
    ),
    "an engine with a layer left high": (
        graph_faults.edit_graph(graph_faults.leave_high("blocks.3.ffn.2"), engine=True),
        {},
        ("blocks.3.ffn.2.weight is not 8-bit instead of int8",),
    ),
    "layers that are not run as integers": (
        graph_faults.signed_activations,
        {},
        ("ONNX Runtime ran ", " of the 60 8-bit layers of dit as integer products"),
    ),
    "attention left high": (
        faults.another_recipe(faults.high_attention),
        faults.FP8_ATTENTION,
        ("blocks.0.self_attn.attend is not 8-bit instead of fp8 attention",),
    ),
    "attention scales that are swapped": (
        faults.edit_scales(
            faults.swap("blocks.1.self_attn.attend.q_scale", "blocks.1.self_attn.attend.v_scale")
        ),
        faults.FP8_ATTENTION,
        ("blocks.1.self_attn.attend has the input scale ",),
    ),
    "attention scales that are swapped in the graph": (
        graph_faults.edit_graph(
            graph_faults.swap_readers(
                "blocks.1.self_attn.attend.q_scale", "blocks.1.self_attn.attend.k_scale"
            )
        ),
        faults.FP8_ATTENTION,
        ("blocks.1.self_attn.attend has the input scale ",),
    ),
    "a text encoder without a scale": (
        graph_faults.edit_graph(
            graph_faults.leave_high("blocks.1.ffn.fc1", place=1), "text_encoder"
        ),
        {},
        ("text_encoder was", "blocks.1.ffn.fc1.weight is scaled by nothing instead of "),
    ),
    "an input of another type": (
        graph_faults.edit_graph(graph_faults.round_to_int8),
        faults.FP8,
        ("blocks.2.ffn.2.weight is fp8-weight instead of fp8;",),
    ),
    "a table that scales are added to": (
        graph_faults.edit_graph(graph_faults.add_rows, "text_encoder"),
        {},
        ("token_embedding.weight is scaled by nothing instead of token_embedding.weight_scale",),
    ),
    "a table with the scales of other rows": (
        graph_faults.edit_graph(graph_faults.scale_other_rows, "text_encoder"),
        {},
        ("token_embedding.weight is scaled by nothing instead of token_embedding.weight_scale",),
    ),
    "a table without scales": (
        graph_faults.edit_graph(graph_faults.ignore_rows, "text_encoder"),
        {},
        ("token_embedding.weight is scaled by nothing instead of token_embedding.weight_scale",),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.fault("quantisation that did nothing")
def test_a_fault_stops_the_export(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults.require_refused(FAULTS[fault], tmp_path, monkeypatch)


SOUND: dict[str, tuple[dict[str, Any], str]] = {
    "int8": ({}, "int8"),
    "fp8, attention": (faults.FP8_ATTENTION, "fp8"),
    "dynamic": (faults.DYNAMIC, "fp8 dynamic"),
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
    assert dit.quantization.verified_counts == {kind: 60} | ({"fp8 attention": 6} if heads else {})
    assert dit.quantization.layers.keys() == set(ALL)
    assert text.quantization.verified_counts == {"int8-weight": 15}
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
UNSEEN: dict[str, Fault] = {
    "no GELU": graph_faults.edit_graph(graph_faults.drop_gelu),
    "biases of another layer": graph_faults.edit_graph(graph_faults.another_bias),
    "shift for scale": graph_faults.edit_graph(graph_faults.swap_modulation),
    "inputs that are not smoothed": graph_faults.edit_graph(graph_faults.ignore_smoothing),
    "an engine without GELU": graph_faults.edit_graph(graph_faults.drop_gelu, engine=True),
}


@pytest.mark.parametrize("fault", UNSEEN)
def test_golden_steps_see_what_reading_back_cannot(
    fault: str, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    UNSEEN[fault](monkeypatch)
    bundle = export()
    assert bundle.manifest.components["dit"].quantization.verified_counts == {"int8": 60}
    with pytest.raises(
        GateError, match=r"[1-4] of 4 golden steps are below the gate: cosine"
    ) as caught:
        require_golden(check_golden(bundle, threads=1), Gates())
    assert "\n" not in str(caught.value)


def test_the_gate_stops_the_export(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph_faults.edit_graph(graph_faults.drop_gelu)(monkeypatch)
    with pytest.raises(GateError, match="golden steps are below the gate"):
        export(gate=True)
    assert list(tmp_path.iterdir()) == []
