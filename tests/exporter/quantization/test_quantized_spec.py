"""Quantised graphs on ONNX Runtime against rounded inputs and weights in plain PyTorch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from tests.support.checkpoints import OUR_T5, TASKS
from tests.support.eightbit import (
    SMALL,
    build,
    make_recipe,
    quantized_reference,
    random_feeds,
    random_weights,
    run_torch,
    trace_once,
)
from tests.support.peers import randomise, relative_error
from wanx.config.models import DiTConfig
from wanx.exporter.component_writer import save_graph
from wanx.exporter.components import dit_spec, text_encoder_spec
from wanx.exporter.graph import trace as trace_module
from wanx.exporter.graph.attach import attach_weights
from wanx.exporter.graph.trace import trace
from wanx.exporter.quantization.quantize import scale_tensors
from wanx.exporter.quantization.quantized_spec import quantize_module, quantized_spec
from wanx.exporter.quantization.recipe import Recipe, shared_input, text_recipe
from wanx.exporter.quantization.scheme import QuantizeOptions
from wanx.exporter.targets.onnxruntime.graph import optimize_for_ort
from wanx.files.safetensors import SafetensorsWriter
from wanx.models.dit.model import WanDiT
from wanx.models.quantized import QuantEmbedding, QuantLinear, WeightOnlyLinear, quantize_weight
from wanx.models.text_encoder import UMT5Encoder
from wanx.runtime.sessions.onnxruntime.loading import session_options

CASES: dict[str, tuple[DiTConfig, str, QuantizeOptions]] = {
    "int8": (SMALL, "int8", QuantizeOptions()),
    "fp8": (replace(TASKS["flf2v"][2], num_layers=1), "fp8", QuantizeOptions()),
    "fp8, dynamic": (
        replace(SMALL, num_layers=1),
        "fp8",
        QuantizeOptions(activation_scale="dynamic"),
    ),
    "everything": (
        TASKS["i2v"][2],
        "fp8",
        QuantizeOptions(weight_scale="tensor", attention="fp8", smooth=0.5),
    ),
    "vace": (
        replace(TASKS["vace"][2], num_layers=1, vace_layers=(0,)),
        "int8",
        QuantizeOptions(smooth=0.5),
    ),
}


def noise(config: DiTConfig, weights: dict[str, Tensor], feeds: object, expected: Tensor) -> float:
    """How far 8 bits move the answer; no test may pass without them."""
    plain = WanDiT(config)
    plain.load_state_dict({name: weight.float() for name, weight in weights.items()})
    error = relative_error(run_torch(plain, feeds), expected)
    assert error > 1e-3
    return error


def require_equal(
    folder: Path,
    config: DiTConfig,
    weights: dict[str, Tensor],
    scheme: str,
    options: QuantizeOptions | None = None,
    kept: tuple[str, ...] = (),
) -> Recipe:
    """Build, run both graphs, and compare them with the oracle.

    Rounding errors of fp32 may move a few numbers of thousands to their 8-bit neighbours, which is
    much less than what rounding all inputs of a single layer does.
    """
    feeds = random_feeds(config)
    recipe = make_recipe(config, weights, feeds, scheme, options, kept)
    built = build(folder, config, weights, recipe)
    expected = quantized_reference(config, weights, built, feeds)
    allowed = 0.03 * noise(config, weights, feeds, expected)
    assert relative_error(built.run(feeds, engine=False), expected) <= allowed
    assert relative_error(built.run(feeds), expected) <= allowed
    return recipe


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_the_recipe_says(case: str, tmp_path: Path) -> None:
    config, scheme, options = CASES[case]
    require_equal(tmp_path, config, random_weights(config), scheme, options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_may_come_in_16_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    require_equal(tmp_path, SMALL, random_weights(SMALL, dtype), "int8")


def test_blocks_that_differ(tmp_path: Path) -> None:
    """Where the first reader of an input stays high, the next one names the scale."""
    kept = ("blocks.1.ffn.0", "blocks.2.self_attn.q", "blocks.2.cross_attn.k")
    recipe = require_equal(tmp_path, SMALL, random_weights(SMALL), "int8", kept=kept)
    assert not recipe.is_repeated("blocks", 3)
    spec = quantized_spec(dit_spec(SMALL), recipe)
    scales = {n for n, _ in spec.module().named_parameters() if n.endswith("input_scale")}
    assert scales >= {f"blocks.2.{n}.input_scale" for n in ("self_attn.k", "cross_attn.v")}


def test_equal_blocks_are_traced_from_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Node by node it is the graph of the whole network, and every block has its own scales."""
    config, scheme, options = CASES["everything"]
    recipe = make_recipe(config, random_weights(config), random_feeds(config), scheme, options)
    spec = quantized_spec(dit_spec(config), recipe)
    assert spec.blocks == 3
    repeated = trace_once(spec)
    monkeypatch.setattr(trace_module, "TRACED_BLOCKS", 3)
    whole = trace(spec)
    assert structure(repeated) == structure(whole)
    kinds = [{n: v.dtype for n, v in m.graph.initializers.items()} for m in (repeated, whole)]
    assert kinds[0] == kinds[1]
    assert kinds[0].keys() >= scale_tensors({}, recipe).keys()


def structure(model: object) -> list[object]:
    """Every node in order, with values numbered as they appear and weights by their names."""
    numbers: dict[str, int] = {}

    def seen(value: object) -> object:
        if value is None or value.is_initializer():
            return value and value.name
        return numbers.setdefault(value.name, len(numbers))

    inputs = [seen(value) for value in model.graph.inputs]
    nodes = [
        (
            node.domain, node.op_type, *map(seen, node.inputs), *map(seen, node.outputs),
            *sorted(map(str, node.attributes.values())),
        )
        for node in model.graph
    ]  # fmt: skip
    return [inputs, nodes, [seen(value) for value in model.graph.outputs]]


@pytest.mark.parametrize("config", [SMALL, TASKS["i2v"][2], TASKS["vace"][2]])
def test_layers_with_one_input_share_its_scale(config: DiTConfig) -> None:
    recipe = make_recipe(config, random_weights(config), random_feeds(config))
    with torch.device("meta"):
        plain = WanDiT(config)
        module = quantize_module(plain, recipe)
    assert module is plain
    layers = {n for n, m in module.named_modules() if isinstance(m, QuantLinear)}
    blocks = ("blocks.", "vace_blocks.")
    with torch.device("meta"):
        linears = {n for n, m in WanDiT(config).named_modules() if isinstance(m, nn.Linear)}
    inside = {n for n in linears if n.startswith(blocks)}
    assert layers == {n for n in inside if not n.endswith(("before_proj", "after_proj"))}
    scales = {n for n, _ in module.named_parameters() if n.endswith("input_scale")}
    assert scales == {f"{shared_input(n)}.input_scale" for n in layers}
    high = {n for n, m in module.named_modules() if type(m) is nn.Linear}
    assert high == linears - layers


def test_a_text_encoder(tmp_path: Path) -> None:
    """With 8-bit weights and an 8-bit table; what it computes with them is not rounded."""
    config = replace(OUR_T5, num_layers=3)
    plain = randomise(UMT5Encoder(config), seed=2)
    recipe = text_recipe(config)
    linears = {n for n, m in plain.named_modules() if isinstance(m, nn.Linear)}
    assert (set(recipe.layers), recipe.embeddings) == (linears, ("token_embedding",))
    spec = quantized_spec(text_encoder_spec(config), recipe)
    assert spec.blocks == 3
    with torch.device("meta"):
        eight = (WeightOnlyLinear, QuantEmbedding)
        assert {n for n, m in spec.module().named_modules() if isinstance(m, eight)} == {
            *linears, "token_embedding",
        }  # fmt: skip
    tensors: dict[str, Tensor] = {}
    ids = torch.tensor([[3, 0, 49, 3, 17, 30, 1]])
    exact = plain(ids)
    for name, parameter in plain.named_parameters():
        if name in recipe.weights:
            tensors[name], tensors[f"{name}_scale"] = quantize_weight(parameter, torch.uint8)
            numbers = tensors[name].double() - 128
            parameter.copy_(numbers * tensors[f"{name}_scale"].double()[:, None])
        else:
            tensors[name] = parameter
    expected = plain(ids)
    assert relative_error(exact, expected) > 1e-3

    rows = sorted(tensors.items(), key=lambda row: row[1].dtype == torch.uint8)
    names = {torch.uint8: "U8", torch.float32: "F32"}
    header = [(name, names[t.dtype], tuple(t.shape)) for name, t in rows]
    with SafetensorsWriter(tmp_path / "text.safetensors", header) as writer:
        for _, tensor in rows:
            writer.write(tensor.contiguous().numpy().tobytes())
    model = trace_once(spec)
    attach_weights(model, writer.header.entries, tmp_path)
    save_graph(model, tmp_path / "portable.onnx")
    assert optimize_for_ort(model)
    save_graph(model, tmp_path / "engine.onnx")
    for graph in ("portable.onnx", "engine.onnx"):
        options = session_options(tmp_path, threads=1)
        if graph == "portable.onnx":
            # By itself ONNX Runtime rounds the inputs of such layers to 8 bits too.
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        session = onnxruntime.InferenceSession(
            (tmp_path / graph).read_bytes(), options, providers=["CPUExecutionProvider"]
        )
        (features,) = session.run(None, {"ids": ids.numpy()})
        assert features.dtype == np.float32
        # The engine's activations have 14 bits.
        assert relative_error(features, expected) <= (1e-5 if graph == "portable.onnx" else 5e-4)
