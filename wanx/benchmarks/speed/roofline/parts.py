"""Parts of a model that the nodes of its graph belong to, in the field's words.

Nodes of exported graphs have no names; weights do. A product belongs to the part whose weight it
reads. Attention reads none, and belongs to the weights that its inputs come from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

SELF_ATTENTION, CROSS_ATTENTION, ATTENTION = "self-attention", "cross-attention", "attention"
ATTENTION_LINEARS, FEED_FORWARD = "attention linears", "feed-forward linears"
CONVOLUTIONS, EMBEDDINGS = "convolutions", "embeddings and head"
REST = "norms, residuals and activations"

_PRODUCTS = {
    *("MatMul", "Gemm", "Conv", "Gather", "QuantLinear", "QuantLinearRows", "WeightOnlyLinear"),
}
_ATTENTION = re.compile("Attention$")
# Operations that leave a weight a weight.
_VIEWS = {"Transpose", "Cast", "CastLike", "Reshape", "Unsqueeze", "Squeeze", "DequantizeLinear"}
_BY_WEIGHT = (
    (re.compile(r"(^|\.)(self_attn|cross_attn|attn)\."), ATTENTION_LINEARS),
    (re.compile(r"\.(ffn|mlp)\."), FEED_FORWARD),
)
_NAME = re.compile(r"(?:_inlfunc_)?(.*?)#")


class WeightTracer:
    """Traces the values of a graph to the weights that they come from.

    Attributes:
        weights: by value, the weight that it is, or is a view of.
        producers: by value, the node that makes it.
    """

    def __init__(self, model: ModelProto) -> None:
        """Read a graph whose nodes are in topological order."""
        self.weights: dict[str, str] = {w.name: w.name for w in model.graph.initializer}
        self.producers: dict[str, NodeProto] = {}
        for node in model.graph.node:
            self.producers |= dict.fromkeys(node.output, node)
            if node.op_type in _VIEWS and node.input and node.input[0] in self.weights:
                self.weights |= dict.fromkeys(node.output, self.weights[node.input[0]])

    def matrix_of(self, node: NodeProto) -> str | None:
        """The weight that a product multiplies with."""
        names = (self.weights.get(value, "") for value in node.input)
        return next((name for name in names if name.endswith("weight")), None)

    def upstream(self, node: NodeProto) -> Iterator[str]:
        """Weights that the inputs of a node were made with, the nearest first."""
        waiting, seen = list(node.input), set[str]()
        while waiting:
            value = waiting.pop(0)
            if value in seen:
                continue
            seen.add(value)
            if value in self.weights:
                yield self.weights[value]
            elif value in self.producers:
                waiting += self.producers[value].input


def parts_of(model: ModelProto) -> list[str]:
    """The part of each node of a graph."""
    tracer = WeightTracer(model)
    return [_part(node, tracer) for node in model.graph.node]


def name_nodes(model: ModelProto, labels: Sequence[str]) -> None:
    """Give each node, also those inside functions, a name that begins with its label and ``#``.

    A function that is called under several labels is copied, so that inlining keeps them apart.
    """
    functions = {(f.domain, f.name): f for f in model.functions}
    for number, (node, label) in enumerate(zip(model.graph.node, labels, strict=True)):
        node.name = f"{label}#{number}"
        function = functions.get((node.domain, node.op_type))
        if function is None:
            continue
        node.op_type = f"{label}#{function.name}"
        if (node.domain, node.op_type) not in functions:
            functions[node.domain, node.op_type] = copy = model.functions.add()
            copy.CopyFrom(function)
            copy.name = node.op_type
            for inner, called in enumerate(copy.node):
                called.name = f"{label}#{inner}"


def label_in(name: str) -> str | None:
    """The label in the name of a node that :func:`name_nodes` named; None for other names."""
    match = _NAME.match(name)
    return match[1] if match else None


def _part(node: NodeProto, tracer: WeightTracer) -> str:
    if _ATTENTION.search(node.op_type):
        return _attention(node, tracer)
    if node.op_type not in _PRODUCTS:
        return REST
    weight = tracer.matrix_of(node)
    if weight is None:
        return _attention(node, tracer) if node.op_type == "MatMul" else REST
    for pattern, part in _BY_WEIGHT:
        if pattern.search(weight):
            return part
    return CONVOLUTIONS if node.op_type == "Conv" else EMBEDDINGS


def _attention(node: NodeProto, tracer: WeightTracer) -> str:
    for weight in tracer.upstream(node):
        if "self_attn." in weight:
            return SELF_ATTENTION
        if "cross_attn." in weight:
            return CROSS_ATTENTION
    return ATTENTION
