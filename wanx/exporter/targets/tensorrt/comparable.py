"""Graph of a segment with the outputs of its layers, for comparison across runtimes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import onnx
from onnx import TensorProto, helper

from wanx.config.number_formats import FLOATS
from wanx.exporter.targets.tensorrt.graph import OUTPUT, WEIGHT
from wanx.runtime.sessions.base import Array

BATCH = "B"
_RESHAPING = ("Cast", "CastLike", "DequantizeLinear", "Reshape", "Transpose", "Unsqueeze")
_HIGHS = tuple(row.onnx for row in FLOATS if row.bits == 16)


def with_layer_outputs(
    graph: onnx.ModelProto,
    weights: Mapping[str, TensorProto],
    inputs: Mapping[str, Array],
    batched: Collection[str] = (),
) -> onnx.ModelProto:
    """Embed the weights; make inputs and outputs fp32; add the output of every layer.

    Args:
        graph: from :func:`segment_graph`; changed in place.
        weights: by name, without ``weight.``.
        inputs: arrays of the sizes that axes are fixed to.
        batched: inputs whose first axis stays as it is, called B.
    """
    body = graph.graph
    layers = layer_outputs(body.node)
    dtypes = {item.name: item.type.tensor_type.elem_type for item in body.input}
    outputs = layers | {item.name.removeprefix(OUTPUT): item.name for item in body.output}
    for field in ("input", "output"):
        body.ClearField(field)
    for name, tensor in weights.items():
        tensor.name = f"{WEIGHT}{name}"
        body.initializer.append(tensor)
    before = []
    for name, array in inputs.items():
        kind = dtypes[name]
        if kind in _HIGHS:
            before.append(helper.make_node("Cast", [name], [f"{name}.in"], to=kind))
            for node in body.node:
                node.input[:] = [f"{name}.in" if each == name else each for each in node.input]
            kind = TensorProto.FLOAT
        shape = [BATCH, *array.shape[1:]] if name in batched else array.shape
        body.input.append(helper.make_tensor_value_info(name, kind, shape))
    nodes = [*before, *body.node]
    body.ClearField("node")
    body.node.extend(nodes)
    for name, value in outputs.items():
        body.node.append(helper.make_node("Cast", [value], [f"{name}.out"], to=TensorProto.FLOAT))
        body.output.append(helper.make_tensor_value_info(f"{name}.out", TensorProto.FLOAT, None))
    return graph


def layer_outputs(nodes: Sequence[onnx.NodeProto]) -> dict[str, str]:
    """Map each layer with a weight, by its name in the model, to its output value."""
    weights: dict[str, str] = {}  # by value
    outputs: dict[str, str] = {}
    for node in nodes:
        read = [weights.get(name, name.removeprefix(WEIGHT)) for name in node.input]
        held = [
            name
            for name, value in zip(read, node.input, strict=True)
            if value.startswith(WEIGHT) or value in weights
        ]
        if not held:
            continue
        product = node.op_type in ("MatMul", "Conv") and len(held) < len(read)
        bias = node.op_type == "Add" and len(held) == 1 and held[0].endswith(".bias")
        if node.op_type in _RESHAPING and read[0] in held:
            weights[node.output[0]] = read[0]
        elif product or bias:
            outputs[held[0].rpartition(".")[0]] = node.output[0]
    return outputs
