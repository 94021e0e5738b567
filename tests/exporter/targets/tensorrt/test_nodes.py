"""Nodes replaced by the plug-in, alone and in a whole block."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.support.plugins import CASES, Case
from tests.support.rtx_builds import model_of, needs_rtx, run
from wanx.bundle.plugin_kernel import Description, PluginKernel, Value, Variant
from wanx.exporter.targets.tensorrt import nodes
from wanx.exporter.targets.tensorrt.nodes import Replaced, plugin_notes, use_plugins
from wanx.kernels.registry import DOMAIN

BLOCK = """
from dataclasses import replace
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
import onnx.inliner
from tests.support.eightbit import SMALL
from wanx.config.models import PRESETS
from wanx.exporter.components import dit_spec
from wanx.exporter.partition.partition import partition
from wanx.exporter.partition.stateless import example_arguments, export_segment
from wanx.exporter.quantization.quantized_spec import quantized_spec
from wanx.exporter.quantization.recipe import Recipe, dit_candidates
from wanx.exporter.quantization.scheme import SCHEMES, QuantizeOptions
from wanx.exporter.targets.tensorrt.forms import FUNCTION_BODIES
from wanx.kernels.registry import ONNX_FUNCTIONS, OpsAsNodes

config = replace(PRESETS["t2v-1.3B"].dit, num_layers=1)
layers_8bit, _ = dit_candidates(config, QuantizeOptions())
recipe = Recipe(scheme=SCHEMES["fp8"], options=QuantizeOptions(), layers=dict.fromkeys(layers_8bit, 0.1))
parts = partition(quantized_spec(dit_spec(config), recipe), torch.bfloat16)
segment, cpu = parts.segments["block"], torch.device("cpu")
with OpsAsNodes():
    program = export_segment(segment, parts.axes, cpu)
names = [*(i.name for i in segment.inputs), *(f"weight.{n}" for n, _ in segment.parameters)]
with FakeTensorMode(allow_non_fake_inputs=True):
    exported = torch.onnx.export(
        program, example_arguments(segment, parts.axes, cpu), dynamo=True, optimize=False,
        opset_version=23, input_names=names, output_names=["x_out"], verbose=False,
    ).model.clone
functions = ONNX_FUNCTIONS | FUNCTION_BODIES
found = {}
for plugins in ((), ("RMSNormRope", "GeluQuantize")):
    model = exported()
    for name in {n.op_type for n in model.graph if n.domain == "wanx"}:
        body = ir.serde.deserialize_function(functions[name].to_function_proto())
        model.functions[body.identifier()] = body
    # Scales that are inputs are factors.
    for number, node in enumerate([n for n in model.graph if n.op_type == "QuantizeLinear"]):
        divide = ir.node("Div", node.inputs[:2])
        divide.outputs[0].name = f"steps_{number}"
        one = ir.node("Constant", [], {"value_float": 1.0})
        one.outputs[0].name = f"one_{number}"
        model.graph.insert_before(node, [divide, one])
        node.replace_input_with(0, divide.outputs[0])
        node.replace_input_with(1, one.outputs[0])
    replaced = use_plugins(model, plugins, [89, 120], functions)
    proto = ir.to_proto(model)
    for part in (proto.graph, *proto.functions):
        for node in part.node:
            node.ClearField("name")
    proto = onnx.inliner.inline_local_functions(proto)
    for node in proto.graph.node:
        node.ClearField("name")
    plan, problem = build(ir.serde.deserialize_model(proto), lambda n: not n.startswith("rope_"))
    assert plan, (problem, log.lines[-5:])
    found[",".join(plugins)] = {
        "plugins": replaced.plugins, "unsupported": replaced.unsupported, "layers": layers(),
        "functions": [plan.count(name) for name in (b"_rms_norm_rope_kernel", b"_quantize_kernel")],
    }
"""  # noqa: E501


@needs_rtx
def test_a_whole_block_is_built_around_plugins() -> None:
    found = run({"block": BLOCK})["block"]
    plain, plugged = found[""], found["RMSNormRope,GeluQuantize"]
    assert plain["plugins"] == {}
    assert plugged["plugins"] == {"RMSNormRope": 1, "GeluQuantize": 1}
    assert plugged["unsupported"] == {}
    assert plain["functions"] == [0, 0]
    assert min(plugged["functions"]) > 0

    def products(facts: dict[str, Any]) -> int:
        return sum(kind == "gemm" and given[0][1] == "FP8" for kind, given, _ in facts["layers"])

    assert products(plugged) == products(plain) >= 8
    customs = [layer for layer in plugged["layers"] if layer[0] == "custom_layer"]
    assert len(customs) in (2, 4)  # the log tells of one GPU or of both
    for _, _, made in customs:
        if made and made[0][1] == "FP8":
            # The product reads what the plug-in writes, with nothing between them.
            readers = [kind for kind, given, _ in plugged["layers"] if made[0] in given]
            assert set(readers) == {"gemm"}


def test_nodes_without_a_kernel_keep_their_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "compile_plugin_kernel", lambda *_: pytest.fail("nothing to carry"))
    rope = CASES["rope"]
    narrow = Case(rope.op, rope.inputs, {"num_heads": 64, "eps": 1e-6})
    model = model_of(narrow)
    replaced = use_plugins(model, {"RMSNormRope"}, [89])
    assert replaced.plugins == {}
    ((reason, count),) = replaced.unsupported["RMSNormRope"].items()
    assert "no power of two" in reason
    assert count == 1
    assert [node.op_type for node in model.graph] == ["RMSNormRope"]
    assert len(model.functions) == 1
    untold = model_of(rope)
    untold.graph.inputs[0].shape = None
    (reason,) = use_plugins(untold, {"RMSNormRope"}, [89]).unsupported["RMSNormRope"]
    assert "does not tell" in reason
    assert use_plugins(model_of(rope), set(), [89]).plugins == {}
    with pytest.raises(KeyError, match="no plug-in for Foo"):
        use_plugins(model_of(rope), {"Foo"}, [89])


def test_one_kernel_is_compiled_for_equal_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    value = Value(dtype="bf16", shape=("a",))
    variant = Variant(
        sm=89,
        function="f",
        size=4,
        warps=1,
        shared=0,
        arguments=(),
        grid=((1,), (1,), (1,)),
    )
    description = Description(op="f", inputs=(value,), outputs=(value,), variants=(variant,))
    kernel = PluginKernel(description=description, code=b"\x7fELF")
    asked: list[tuple[Any, ...]] = []

    def compile_plugin_kernel(*arguments: Any) -> PluginKernel:
        asked.append(arguments)
        return kernel

    monkeypatch.setattr(nodes, "compile_plugin_kernel", compile_plugin_kernel)
    model = model_of(CASES["rope"])
    (first,) = model.graph
    second = ir.Node(
        DOMAIN.domain, first.op_type, [*first.outputs, *first.inputs[2:]],
        first.attributes.values(), num_outputs=2,
    )  # fmt: skip
    for value_out, like in zip(second.outputs, first.outputs, strict=True):
        value_out.name, value_out.type, value_out.shape = f"{like.name}_2", like.type, like.shape
    model.graph.append(second)
    assert use_plugins(model, {"RMSNormRope"}, [89]).plugins == {"RMSNormRope": 2}
    assert len(asked) == 1
    assert [node.op_type for node in model.graph] == ["WanxTriton"] * 2
    node = model.graph[1]
    assert node.inputs[0] is model.graph[0].outputs[0]
    held = node.attributes["code"].value
    assert np.array_equal(held.numpy(), np.frombuffer(b"\x7fELF", np.int8))
    assert '"op":"f"' in node.attributes["description"].value


def test_nodes_are_counted_over_all_graphs() -> None:
    graphs = [
        Replaced(plugins={"RMSNormRope": 2}, unsupported={"GeluQuantize": {"x is wide": 1}}),
        Replaced(
            plugins={"RMSNormRope": 1},
            unsupported={"GeluQuantize": {"x is wide": 2, "x is int8": 1}, "Other": {"no": 1}},
        ),
    ]
    assert plugin_notes(("RMSNormRope", "GeluQuantize", "AdaLNQuantize"), graphs) == [
        "plug-in RMSNormRope: takes 3 of 3 nodes",
        "plug-in GeluQuantize: takes 0 of 4 nodes, not those where x is wide (3); x is int8 (1)",
        "plug-in AdaLNQuantize: takes 0 of 0 nodes",
    ]
