"""Shapes of all values of a graph whose inputs have known shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wanx.errors import WanxError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx import ModelProto, NodeProto

# What exported graphs compute shapes with.
_FOLDED = {
    *("Cast", "CastLike", "Concat", "Gather", "Add", "Sub", "Mul", "Div", "Max", "Unsqueeze"),
    *("Squeeze", "Slice", "Range", "Reshape", "Neg", "Abs", "Expand"),
}
_SMALL = 1 << 16  # elements of a value that is worth computing


class Shapes:
    """Shapes and sizes of the values of a graph without functions."""

    def __init__(self, model: ModelProto) -> None:
        """Read what shape inference found."""
        graph = model.graph
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._widths: dict[str, int] = {}
        for value in (*graph.input, *graph.output, *graph.value_info):
            tensor = value.type.tensor_type
            axes = tensor.shape.dim
            if tensor.HasField("shape") and all(axis.HasField("dim_value") for axis in axes):
                self._shapes[value.name] = tuple(axis.dim_value for axis in axes)
            if tensor.elem_type:
                self._widths[value.name] = _width(tensor.elem_type)
        for weight in graph.initializer:
            self._shapes[weight.name] = tuple(weight.dims)
            self._widths[weight.name] = _width(weight.data_type)

    def __getitem__(self, name: str) -> tuple[int, ...]:
        """The shape of a value.

        Raises:
            WanxError: it is not known.
        """
        if name not in self._shapes:
            raise WanxError(f"the shape of {name} does not follow from those of the inputs")
        return self._shapes[name]

    def get(self, name: str) -> tuple[int, ...] | None:
        """The shape of a value, if it is known."""
        return self._shapes.get(name)

    def bytes(self, name: str) -> float:
        """The size of a value as it is stored."""
        return math.prod(self[name]) * self._widths[name]


def dimensions(symbols: Mapping[str, int], text: str) -> int:
    """The size of an axis such as ``8*h``."""
    factor, _, symbol = text.rpartition("*")
    return symbols[symbol] * int(factor or 1)


def inferred(model: ModelProto) -> ModelProto:
    """The graph without functions and with the shapes of all values, as far as they are known.

    ONNX infers shapes from constants but not through all that graphs compute shapes with, so that
    is computed here, in turn with inference.
    """
    import onnx
    from onnx.inliner import inline_local_functions

    flat = inline_local_functions(model)
    known: dict[str, NDArray[Any]] = {}
    while True:
        # Shapes that were inferred from half of the facts may be wrong, and would stay.
        del flat.graph.value_info[:]
        flat = onnx.shape_inference.infer_shapes(flat, data_prop=True)
        if not _fold(flat, known):
            return flat


def _fold(model: ModelProto, known: dict[str, NDArray[Any]]) -> bool:
    """Turn what can be computed into constants; say whether there was anything."""
    import numpy as np
    import onnx

    shapes, folded = Shapes(model), False
    opsets = {opset.domain: opset.version for opset in model.opset_import}
    for node in model.graph.node:
        (name, *others) = node.output
        if others or name in known:
            continue
        value = None
        if node.op_type == "Constant":
            known[name] = _evaluate(node, {}, opsets)
            continue
        if node.op_type == "Shape":
            shape = shapes.get(node.input[0])
            if shape is not None:
                bounds = {a.name: a.i for a in node.attribute}
                value = np.array(shape[bounds.get("start", 0) : bounds.get("end")], np.int64)
        elif node.op_type in _FOLDED and all(i in known for i in node.input if i):
            feeds = {i: known[i] for i in node.input if i}
            if sum(array.size for array in feeds.values()) <= _SMALL:
                value = _evaluate(node, feeds, opsets)
        if value is not None:
            known[name] = value
            constant = onnx.helper.make_node(
                "Constant", [], [name], name=node.name, value=onnx.numpy_helper.from_array(value)
            )
            node.CopyFrom(constant)
            folded = True
    return folded


def _evaluate(
    node: NodeProto, feeds: dict[str, NDArray[Any]], opsets: dict[str, int]
) -> NDArray[Any]:
    from onnx.reference import ReferenceEvaluator

    results: Any = ReferenceEvaluator(node, opsets=opsets).run(None, feeds)
    value: NDArray[Any] = results[0]
    return value


def _width(data_type: int) -> int:
    import onnx

    return int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize)
