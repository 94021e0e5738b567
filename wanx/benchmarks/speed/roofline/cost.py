"""Cost of a graph, counted in the graph itself: operations, and bytes that have to move.

Operations are two for each multiply-add of a product, a convolution or attention; nothing else is
counted. Bytes are those of an ideal implementation: each node, a ``wanx`` function being one node,
reads what it takes and writes what it gives once, weights in the width in which they are stored;
views are free. Arithmetic on what a product has just made is done in its epilogue, and moves only
what else it reads, such as a residual.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wanx.benchmarks.speed.roofline.parts import WeightTracer, label_in, name_nodes, parts_of
from wanx.config.number_formats import QUANTIZED
from wanx.exporter.graph.value_shapes import Shapes, dimensions, inferred

if TYPE_CHECKING:
    from onnx import NodeProto

_FREE = {
    *("Constant", "Shape", "Reshape", "Unsqueeze", "Squeeze", "Transpose", "Slice", "Identity"),
    *("Expand", "Split", "Range", "CastLike", "Cast"),
}
_PRODUCTS = {"MatMul", "Gemm", "Conv"}
_PRODUCTS_BY_NAME = ("QuantLinear", "WeightOnlyLinear")
_ARITHMETIC = {
    *("Add", "Sub", "Mul", "Div", "Gelu", "Sigmoid", "Tanh", "Clip", "QuantizeLinear", "Erf"),
}
_QUANTIZED = {row.onnx: row.name for row in QUANTIZED}


@dataclass(frozen=True, kw_only=True)
class PartCost:
    """Cost of a part of a model in one run of its graph.

    Attributes:
        part: its name; see :mod:`wanx.benchmarks.speed.roofline.parts`.
        flops: operations by the type that they are done in: ``int8``, ``fp8``, or ``high`` for
            whatever the target computes in otherwise.
        bytes: that have to move.
    """

    part: str
    flops: Mapping[str, float]
    bytes: float


def component_cost(graph: Path, sizes: Mapping[str, int]) -> tuple[PartCost, ...]:
    """Count a graph of a bundle.

    Args:
        graph: the ONNX file; its weights are not read.
        sizes: of the dynamic axes, such as ``L`` or ``h`` and ``w``.

    Returns:
        The parts, those of most operations first.

    Raises:
        WanxError: the shapes of the graph do not follow from the sizes.
    """
    import onnx

    model = onnx.load(graph, load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                try:
                    axis.dim_value = dimensions(sizes, axis.dim_param)
                except KeyError:
                    axis.ClearField("dim_param")
    tracer = WeightTracer(model)
    stored = {weight.name: weight.data_type for weight in model.graph.initializer}
    labels = [
        f"{part}|{_kind(node, tracer, stored)}"
        for part, node in zip(parts_of(model), model.graph.node, strict=True)
    ]
    operations = [node.op_type for node in model.graph.node]
    name_nodes(model, labels)
    flat = inferred(model)
    shapes = Shapes(flat)
    flops: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    moved: dict[str, float] = defaultdict(float)
    for node in flat.graph.node:
        if count := _flops(node, shapes):
            part, kind = _split(node)
            flops[part][kind] += count
    fused: set[str] = set()
    for node, operation in zip(model.graph.node, operations, strict=True):
        moved[_split(node)[0]] += _bytes(node, operation, shapes, tracer, fused)
    costs = [
        PartCost(part=part, flops=dict(flops[part]), bytes=moved[part])
        for part in dict.fromkeys([*flops, *moved])
        if sum(flops[part].values()) or moved[part]
    ]
    return tuple(sorted(costs, key=lambda cost: (-sum(cost.flops.values()), -cost.bytes)))


def _kind(node: NodeProto, tracer: WeightTracer, stored: Mapping[str, int]) -> str:
    """The type that a product is done in; only the quantised ones differ from the rest."""
    weight = tracer.matrix_of(node)
    if weight is None or not node.op_type.startswith("QuantLinear"):
        return "high"
    return _QUANTIZED.get(stored[weight], "high")


def _split(node: NodeProto) -> tuple[str, str]:
    label = label_in(node.name)
    assert label is not None, f"{node.name} has no label"
    part, _, kind = label.partition("|")
    return part, kind


def _flops(node: NodeProto, shapes: Shapes) -> float:
    operation = node.op_type
    if operation == "MatMul":
        return 2.0 * math.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]
    if operation == "Gemm":
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        return (
            2.0 * math.prod(shapes[node.output[0]]) * shapes[node.input[0]][0 if transposed else 1]
        )
    if operation == "Conv":
        # A weight is [out, in / groups, ...], so groups are in it already.
        return 2.0 * math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[1]][1:])
    if operation == "Attention":
        return _attention_flops(node, shapes)
    return 0.0


def _attention_flops(node: NodeProto, shapes: Shapes) -> float:
    """Of both products: scores of all queries with all keys, and their sums of values.

    Inputs are ``[B, L, H·D]`` or ``[B, H, L, D]``.
    """
    query, key, value = (shapes[name] for name in node.input[:3])

    def split(shape: tuple[int, ...]) -> tuple[int, int]:
        return (shape[1], shape[2]) if len(shape) == 3 else (shape[2], shape[1] * shape[3])

    (queries, wide), (keys, _), (_, out) = split(query), split(key), split(value)
    return 2.0 * query[0] * queries * keys * (wide + out)


def _bytes(
    node: NodeProto, operation: str, shapes: Shapes, tracer: WeightTracer, fused: set[str]
) -> float:
    """Bytes that a node has to move; ``fused`` collects what the epilogue of a product makes."""
    outputs = [value for value in node.output if value]
    inputs = [value for value in node.input if value]
    if operation in _FREE:
        if fused & set(inputs):
            fused.update(outputs)
        return 0.0
    if operation in _ARITHMETIC and fused & set(inputs):
        others = {tracer.weights.get(value, value) for value in set(inputs) - fused}
        fused.update(outputs)
        return sum(shapes.bytes(value) for value in others)
    if operation in _PRODUCTS or operation.startswith(_PRODUCTS_BY_NAME):
        fused.update(outputs)
    weights = {tracer.weights[value] for value in inputs if value in tracer.weights}
    if operation in ("Gather", "GatherND", "GatherElements"):
        weights = set()  # reads no more of a table than it gives
    moved = sum(shapes.bytes(name) for name in weights)
    moved += sum(shapes.bytes(value) for value in set(inputs) if value not in tracer.weights)
    return moved + sum(shapes.bytes(value) for value in outputs)
