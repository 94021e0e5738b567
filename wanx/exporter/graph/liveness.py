"""Memory of a graph's values, each of which is freed behind its last use.

That is what ONNX Runtime's plan has, and the least that a target takes which runs one node at a
time. Attention keeps no scores; what products and convolutions work in is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx

from wanx.bundle.manifest import ActivationBytes
from wanx.exporter.graph.value_shapes import Shapes, dimensions, inferred

ACTIVATION_BYTES = "wanx.activation_bytes"  # in the metadata of a traced graph
_NEXT = "_next"  # behind the name of an input: the state that follows it
# Operators whose result is the memory of their first input.
_VIEWS = {"Reshape", "Unsqueeze", "Squeeze", "Identity", "Flatten"}
# Tokens, or sides of latents, with which a law is found: so many that what grows is most of it.
_SIZES = {1: (4096, 8192), 2: (32, 64)}
_LONGEST_TEXT = 512


def activation_bytes(model: onnx.ModelProto, axes: Sequence[str]) -> ActivationBytes:
    """Most bytes of values of a graph at a time, as a law of its sizes.

    Args:
        model: the graph, whose initialisers do not count.
        axes: that are dynamic. The law of a text's length is that of the longest.

    Raises:
        WanxError: a shape does not follow from the sizes.
    """

    def peak(size: int) -> tuple[int, float]:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        return size ** len(axes), peak_bytes(copy, dict.fromkeys(axes, size), in_place=True)

    if tuple(axes) in ((), ("n",)):
        return ActivationBytes(fixed=round(peak(_LONGEST_TEXT)[1]), each=0)
    (few, low), (many, high) = (peak(size) for size in _SIZES[len(axes)])
    each = (high - low) / (many - few)
    return ActivationBytes(fixed=round(low - each * few), each=round(each))


def peak_bytes(
    model: onnx.ModelProto, sizes: Mapping[str, int], *, in_place: bool = False
) -> float:
    """Most bytes of values of a graph at a time, its inputs and outputs included.

    Args:
        model: the graph, whose initialisers do not count; its dynamic axes get their sizes.
        sizes: of its dynamic axes, such as ``L``.
        in_place: outputs that are state overwrite what they follow.

    Raises:
        WanxError: a shape does not follow from the sizes.
    """
    for value in (*model.graph.input, *model.graph.output):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_value = dimensions(sizes, axis.dim_param)
    flat = inferred(model)
    shapes, graph = Shapes(flat), flat.graph
    inputs = {value.name for value in graph.input}
    constants = {weight.name for weight in graph.initializer}
    constants |= {n.output[0] for n in graph.node if n.op_type == "Constant"}
    holds: dict[str, str] = {}  # of a view, the value whose memory it is
    # Inputs are the caller's.
    last_use = dict.fromkeys(inputs, len(graph.node))
    for number, node in enumerate(graph.node):
        if node.op_type in _VIEWS and node.input[0] not in constants:
            holds[node.output[0]] = holds.get(node.input[0], node.input[0])
        for name in node.output:
            if in_place and name.endswith(_NEXT) and name.removesuffix(_NEXT) in inputs:
                holds[name] = name.removesuffix(_NEXT)
        for name in node.input:
            owner = holds.get(name, name)
            last_use[owner] = max(number, last_use.get(owner, 0))
    last_use |= {holds.get(value.name, value.name): len(graph.node) for value in graph.output}
    live = {name: shapes.bytes(name) for name in inputs}
    peak = sum(live.values())
    for number, node in enumerate(graph.node):
        for name in node.output:
            if name and name not in holds and name not in constants:
                live[name] = shapes.bytes(name)
        peak = max(peak, sum(live.values()))
        live = {name: size for name, size in live.items() if last_use.get(name, 0) > number}
    return peak
