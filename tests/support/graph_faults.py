"""Faults of graphs, for :mod:`faults`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest

from tests.support.faults import Fault
from wanx.exporter import component_writer, trace_component
from wanx.exporter.components import ComponentSpec
from wanx.exporter.quantization import quantized_spec
from wanx.exporter.targets.onnxruntime import graph
from wanx.models.quantized import WeightOnlyLinear

Change = Callable[[ir.Model], None]


def edit_graph(change: Change, component: str = "dit", *, engine: bool = False) -> Fault:
    """Alter a component's graph after it was traced, or its engine's after it was specialised."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        trace, optimize_for_ort = trace_component.trace, component_writer.optimize_for_ort

        def traced(spec: ComponentSpec) -> ir.Model:
            model = trace(spec)
            if spec.name == component:
                change(model)
            return model

        def specialised(model: ir.Model, *, few_rows: bool) -> bool:
            found = optimize_for_ort(model, few_rows=few_rows)
            if model.graph.name == component:
                change(model)
            return found

        if engine:
            patch.setattr(component_writer, "optimize_for_ort", specialised)
        else:
            patch.setattr(trace_component, "trace", traced)

    return plant


def initializer(model: ir.Model, name: str) -> ir.Value:
    return model.graph.initializers[name]


def reader(model: ir.Model, name: str) -> ir.Node:
    """The one node that reads an initialiser."""
    ((node, _),) = initializer(model, name).uses()
    return node


def leave_high(layer: str, place: int = 2) -> Change:
    """Multiply one layer as an ordinary one, by its 8-bit numbers as if they were its weight."""

    def change(model: ir.Model) -> None:
        node = reader(model, f"{layer}.weight")
        x, weight = node.inputs[0], node.inputs[place]
        assert weight is not None
        weight.type = ir.TensorType(ir.DataType.FLOAT)
        if node.op_type == "QuantLinear":
            x = x.producer().inputs[0]
        turned = ir.node("Transpose", [weight], {"perm": [1, 0]})
        product = ir.node("MatMul", [x, turned.outputs[0]])
        nodes = [turned, product]
        if node.op_type == "QuantLinear":
            nodes.append(ir.node("Add", [product.outputs[0], node.inputs[4]]))
        put_instead(model, node, nodes)

    return change


def put_instead(model: ir.Model, node: ir.Node, nodes: list[ir.Node]) -> None:
    for number, new in enumerate(nodes):
        new.outputs[0].name = f"planted_{number}"
    model.graph.insert_before(node, nodes)
    node.outputs[0].replace_all_uses_with(nodes[-1].outputs[0])
    model.graph.remove(node, safe=True)
    for name in [n for n, value in model.graph.initializers.items() if not value.uses()]:
        del model.graph.initializers[name]


def swap_readers(first: str, second: str) -> Change:
    """Let whatever reads one initialiser read the other."""

    def change(model: ir.Model) -> None:
        values = initializer(model, first), initializer(model, second)
        uses = [list(value.uses()) for value in values]
        for value, others in zip(values, reversed(uses), strict=True):
            for node, index in others:
                node.replace_input_with(index, value)

    return change


def quantise_by_another_scale(model: ir.Model) -> None:
    """Round the input of one layer by the scale of another, but multiply by its own."""
    scale = initializer(model, "blocks.2.ffn.2.input_scale")
    (node,) = {node for node, _ in scale.uses() if node.op_type == "QuantizeLinear"}
    node.replace_input_with(1, initializer(model, "blocks.1.ffn.2.input_scale"))


def ignore_rows(model: ir.Model) -> None:
    """Look up the numbers of a table without their scales."""
    gather = reader(model, "token_embedding.weight")
    cast = gather.outputs[0].uses()[0].node
    centred = cast.outputs[0].uses()[0].node
    mul = centred.outputs[0].uses()[0].node
    assert mul.op_type == "Mul"
    mul.outputs[0].replace_all_uses_with(centred.outputs[0])
    model.graph.remove(mul, safe=True)


def add_rows(model: ir.Model) -> None:
    """Add the scales of a table to its numbers."""
    cast = reader(model, "token_embedding.weight").outputs[0].uses()[0].node
    centred = cast.outputs[0].uses()[0].node
    centred.outputs[0].uses()[0].node.op_type = "Add"


def scale_other_rows(model: ir.Model) -> None:
    """Multiply the numbers of a table by the scales of other rows."""
    expanded = reader(model, "token_embedding.weight_scale")
    gather = expanded.outputs[0].uses()[0].node
    others = ir.node("Mod", [gather.inputs[1], gather.inputs[1]])
    others.outputs[0].name = "others"
    model.graph.insert_before(gather, others)
    gather.replace_input_with(1, others.outputs[0])


def round_to_int8(model: ir.Model) -> None:
    """Round the input of one layer to int8, whatever its weight is."""
    scale = initializer(model, "blocks.2.ffn.2.input_scale")
    (node,) = {node for node, _ in scale.uses() if node.op_type == "QuantizeLinear"}
    node.attributes["output_dtype"] = ir.AttrInt64("output_dtype", ir.DataType.INT8)


def drop_gelu(model: ir.Model) -> None:
    for node in [node for node in model.graph if node.op_type == "Gelu"]:
        node.outputs[0].replace_all_uses_with(node.inputs[0])
        model.graph.remove(node, safe=True)


def another_bias(model: ir.Model) -> None:
    """Let all layers add the bias of one."""
    bias = initializer(model, "blocks.0.self_attn.k.bias")
    for node in model.graph:
        if node.op_type == "QuantLinear" and node.inputs[4].shape == bias.shape:
            node.replace_input_with(4, bias)


def ignore_smoothing(model: ir.Model) -> None:
    """Hand the layers their inputs undivided."""
    for name, value in model.graph.initializers.items():
        if name.endswith("_smooth"):
            for node, index in list(value.uses()):
                assert (node.op_type, index) == ("Div", 1)
                node.outputs[0].replace_all_uses_with(node.inputs[0])
                model.graph.remove(node, safe=True)


def swap_modulation(model: ir.Model) -> None:
    """Take the shift of every AdaLN for its scale."""
    for node in model.graph:
        if node.op_type == "AdaLN":
            first, second = node.inputs[1:3]
            node.replace_input_with(1, second)
            node.replace_input_with(2, first)


def weight_only(patch: pytest.MonkeyPatch) -> None:
    def build(k: int, n: int, *, same_input: object, **options: Any) -> WeightOnlyLinear:
        return WeightOnlyLinear(k, n)

    patch.setattr(quantized_spec, "QuantLinear", build)


def signed_activations(patch: pytest.MonkeyPatch) -> None:
    """Leave the engine to what ONNX Runtime finds by itself."""
    patch.setattr(graph, "_uint8_activations", lambda *_: False)
