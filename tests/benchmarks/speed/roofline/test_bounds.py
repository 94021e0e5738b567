"""Operations that are counted in graphs, against PyTorch's counter; ceilings; where time goes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.support.peers import random_dit, random_text_encoder
from wanx.benchmarks.speed.feeds import dit_feeds
from wanx.benchmarks.speed.roofline.bounds import fraction_text, roofline
from wanx.benchmarks.speed.roofline.ceilings import Ceilings, _int8_call, processor_ceilings
from wanx.benchmarks.speed.roofline.cost import PartCost, component_cost
from wanx.benchmarks.speed.roofline.gpu_peaks import gpu_peaks
from wanx.benchmarks.speed.roofline.parts import REST
from wanx.benchmarks.speed.roofline.profile import OTHER, Operation, Profile, profile_component
from wanx.bundle.reader import Bundle
from wanx.config.models import PRESETS
from wanx.exporter.components import component_specs, dit_spec
from wanx.exporter.graph.attach import attach_weights
from wanx.exporter.graph.trace import trace
from wanx.files.safetensors import TensorRef

Bundles = Callable[[str, str], Bundle]


def total(costs: tuple[PartCost, ...]) -> float:
    return sum(sum(cost.flops.values()) for cost in costs)


def counted(module: nn.Module, *arguments: torch.Tensor, **named: torch.Tensor) -> int:
    # The counter knows attention only as the products that it is made of.
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), counter:
        module(*arguments, **named)
    return counter.get_total_flops()


def test_a_transformer_costs_what_pytorch_counts(bundle_of: Bundles) -> None:
    bundle = bundle_of("t2v", "fp32")
    config = bundle.manifest.config.dit
    latent = torch.zeros(1, config.in_dim, 2, 6, 8)
    text = torch.zeros(1, config.text_len, config.text_dim)
    expected = counted(random_dit(), latent, torch.zeros(1), text)
    costs = component_cost(bundle.graph_path("dit"), {"L": 2 * 3 * 4})
    assert total(costs) == expected
    known = {cost.part: cost for cost in costs}
    # One matrix after the other: q, k, v and o of both attentions, on L tokens or on the text.
    length, dim = 24, config.dim
    linears = 2 * dim * dim * (6 * length + 2 * config.text_len) * config.num_layers
    assert known["attention linears"].flops == {"high": linears}
    hidden = 2 * 2 * length * dim * config.ffn_dim * config.num_layers
    assert known["feed-forward linears"].flops == {"high": hidden}
    scores = 2 * 2 * length * dim * config.num_layers
    assert known["self-attention"].flops == {"high": scores * length}
    assert known["cross-attention"].flops == {"high": scores * config.text_len}
    assert known[REST].flops == {}


def test_a_text_encoder_costs_what_pytorch_counts(bundle_of: Bundles) -> None:
    bundle = bundle_of("t2v", "fp32")
    expected = counted(random_text_encoder(), input_ids=torch.zeros(1, 7, dtype=torch.int64))
    assert total(component_cost(bundle.graph_path("text_encoder"), {"n": 7})) == expected


@pytest.mark.parametrize(
    "name",
    [
        *("vae_decoder_mid_first", "vae_decoder_up_first", "vae_decoder_up_rest"),
        *("vae_encoder_down_rest", "vae_encoder_mid_rest", "image_encoder"),
    ],
)
def test_other_networks_cost_what_pytorch_counts(bundle_of: Bundles, name: str) -> None:
    bundle = bundle_of("i2v", "fp32")
    spec = next(s for s in component_specs(bundle.manifest.config) if s.name == name)
    sizes = {} if name == "image_encoder" else {"h": 6, "w": 8}
    model = spec.build(spec.blocks) if spec.blocks else spec.build()  # type: ignore[call-arg]
    inputs = [item.example(sizes) for item in spec.inputs]
    caches = [item.example(sizes) for item in spec.caches]
    expected = counted(model, *inputs, *([caches] if caches else []))
    # Our attention is one operation to PyTorch, which it cannot count.
    costs = component_cost(bundle.graph_path(name), sizes)
    assert total(tuple(c for c in costs if c.part != "attention")) == expected


@pytest.mark.parametrize("task", ["i2v", "flf2v", "vace"])
def test_every_task_can_be_counted(bundle_of: Bundles, task: str) -> None:
    costs = component_cost(bundle_of(task, "fp32").graph_path("dit"), {"L": 24})
    assert {"self-attention", "cross-attention", "attention linears"} <= {c.part for c in costs}


def test_eight_bits_change_the_types_and_the_bytes(bundle_of: Bundles) -> None:
    high, low = (
        {c.part: c for c in component_cost(bundle_of("t2v", p).graph_path("dit"), {"L": 24})}
        for p in ("fp32", "int8")
    )
    for part, cost in high.items():
        assert sum(low[part].flops.values()) == sum(cost.flops.values())
    assert low["feed-forward linears"].flops.keys() == {"int8"}
    assert low["feed-forward linears"].bytes < 0.5 * high["feed-forward linears"].bytes
    assert low["self-attention"].flops.keys() == {"high"}


def test_full_size_costs_what_is_published(tmp_path: Path) -> None:
    """One step with guidance of the 14B: 3.36 PFLOP at 480P and 13.05 at 720P."""
    spec = dit_spec(PRESETS["t2v-14B"].dit)
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in spec.build(spec.blocks).named_parameters()}
    model = trace(spec)
    weights = {
        name: TensorRef(
            name=name, dtype="BF16", shape=shape, file=tmp_path / "w", offset=0,
            nbytes=2 * int(np.prod(shape)),
        )
        for name, shape in shapes.items()
    }  # fmt: skip
    attach_weights(model, weights, tmp_path)
    graph = tmp_path / "dit.onnx"
    graph.write_bytes(ir.serde.serialize_model(model).SerializeToString())
    for tokens, petaflop, share in ((32_760, 3.36, 0.52), (75_600, 13.05, 0.72)):
        costs = component_cost(graph, {"L": tokens})
        assert 2 * total(costs) / 1e15 == pytest.approx(petaflop, abs=0.005)
        attention = next(c for c in costs if c.part == "self-attention")
        assert sum(attention.flops.values()) / total(costs) == pytest.approx(share, abs=0.005)
    # Weights count in the two bytes that they have, activations in four.
    linears = next(cost for cost in costs if cost.part == "feed-forward linears")
    config = PRESETS["t2v-14B"].dit
    moved = 2 * (2 * config.dim * config.ffn_dim + 4 * tokens * (config.dim + config.ffn_dim))
    assert linears.bytes == pytest.approx(config.num_layers * moved, rel=0.001)


def test_an_epilogue_reads_what_it_adds(tmp_path: Path) -> None:
    """Of x @ w + bias, GELU, plus a residual: both operands, the result, bias and residual."""
    x, residual = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, "L", width])
        for name, width in (("x", 8), ("residual", 16))
    )
    made = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, "L", 16])
    weights = [
        onnx.numpy_helper.from_array(np.zeros(shape, np.float32), f"blocks.0.ffn.0.{name}")
        for name, shape in (("weight", (8, 16)), ("bias", (16,)))
    ]
    nodes = [
        onnx.helper.make_node("MatMul", ["x", weights[0].name], ["sums"]),
        onnx.helper.make_node("Add", ["sums", weights[1].name], ["linear"]),
        onnx.helper.make_node("Gelu", ["linear"], ["gelu"]),
        onnx.helper.make_node("Add", ["residual", "gelu"], ["y"]),
    ]
    graph = onnx.helper.make_graph(nodes, "g", [x, residual], [made], weights)
    imports = [onnx.helper.make_opsetid("", 23)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=imports), tmp_path / "g.onnx")
    costs = component_cost(tmp_path / "g.onnx", {"L": 5})
    assert sum(c.bytes for c in costs) == 4 * (5 * 8 + 8 * 16 + 5 * 16 + 16 + 5 * 16)
    assert total(costs) == 2 * 5 * 8 * 16


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_profile_knows_the_part_of_nearly_everything(bundle_of: Bundles, precision: str) -> None:
    bundle = bundle_of("t2v", precision)
    feeds = dit_feeds(bundle.manifest.config, (5, 8, 8))
    arrays = feeds.constants | feeds.branches[0]
    profiles = [profile_component(bundle, "dit", arrays, threads=1) for _ in range(3)]
    # Shares of milliseconds: a node that another process interrupts has a large one.
    found = min(profiles, key=lambda profile: profile.parts.get(OTHER, 0))
    assert sum(found.parts.values()) == pytest.approx(1)
    assert found.parts.get(OTHER, 0) < 0.05
    assert {"self-attention", "attention linears", "feed-forward linears"} <= found.parts.keys()
    assert len(found.operations) == 10
    shares = [operation.share for operation in found.operations]
    assert shares == sorted(shares, reverse=True)
    layers = bundle.manifest.config.dit.num_layers
    attention = [o for o in found.operations if o.part == "self-attention"]
    assert [o.calls for o in attention] == [layers]


def test_ceilings_are_of_the_products_that_they_say() -> None:
    m, k, n = 5, 64, 16
    (found,) = _int8_call(m, k, n, 1)()  # type: ignore[misc]
    draw = np.random.default_rng(0)
    a = draw.integers(0, 256, (m, k), np.uint8).astype(int) - 128
    b = draw.integers(-127, 128, (k, n), np.int8).astype(int)
    np.testing.assert_allclose(found, a @ b * 1e-4, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_processor_has_ceilings() -> None:
    found = processor_ceilings(1)
    assert found.flops["int8"] > found.flops["high"] > 1e9
    assert 1e9 < found.bytes < 1e12


def test_a_device_has_peaks() -> None:
    rates = gpu_peaks(torch.device("cpu"), side=64, copied=1 << 16)
    assert rates is not None
    assert rates[0]["high"] > 0 < rates[1]


CEILINGS = Ceilings(flops={"high": 100.0, "int8": 400.0}, high="fp32", bytes=10.0)


def test_a_roofline_names_the_largest_gap() -> None:
    costs = [
        PartCost(part="linears", flops={"high": 100.0, "int8": 800.0}, bytes=5.0),
        PartCost(part="attention", flops={"high": 300.0}, bytes=1.0),
        PartCost(part="norms", flops={}, bytes=10.0),
    ]
    operation = Operation(name="MatMul", part="linears", shapes="", calls=1, share=0.3)
    profile = Profile(
        parts={"attention": 0.5, "linears": 0.3, "norms": 0.15, "other": 0.05},
        operations=(operation,),
    )
    found = roofline(
        costs, CEILINGS, profile, runs=2, seconds=40.0, subject=0, case=0, component="dit",
        unit="denoising step",
    )  # fmt: skip
    parts = {part.name: part for part in found.parts}
    assert list(parts) == ["attention", "linears", "norms", "other"]
    assert parts["linears"].least_seconds == 2 * (100 / 100 + 800 / 400)
    assert parts["linears"].fraction == 6 / 12
    assert (parts["linears"].bound, parts["norms"].bound) == ("compute", "memory")
    assert parts["norms"].least_seconds == 2 * 10 / 10
    assert found.largest_gap is parts["attention"]
    assert found.sentence == (
        "The largest gap: attention, 50% of the time of a denoising step, at 0.30 of the ceiling; "
        "0.35 of the ceiling in all."
    )
    assert found.operations == ()


def test_without_a_profile_only_the_whole_is_known() -> None:
    found = roofline(
        [PartCost(part="all", flops={"fp8": 100.0}, bytes=1.0)], CEILINGS, None, runs=1,
        seconds=4.0, subject=0, case=0, component="dit", unit="denoising step",
    )  # fmt: skip
    assert found.least_seconds == 1.0  # a type without a rate of its own runs in the high one
    assert found.parts[0].fraction is None
    assert found.sentence.startswith("A denoising step runs at 0.25 of the ceiling")
    assert [fraction_text(x) for x in (None, 0.004, 0.5)] == ["–", "less than 0.01", "0.50"]
