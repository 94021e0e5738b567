"""Reach of a graph: how much of its input around a tile the tile's own output depends on.

Found by going from the output to the inputs and widening an interval of rows and columns at every
convolution, as receptive fields are (Araujo, Norris and Sim, "Computing Receptive Fields of
Convolutional Neural Networks", 2019). Padding with zeros at the edge of a tile is wrong within the
reach, and right at the edge of the frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from wanx.errors import WanxError

Interval = tuple[int, int]  # first and one past the last
Area = tuple[Interval, Interval]  # rows and columns

# What computes an element from those at the same place, whatever happens to the other axes.
_LOCAL = {
    *("Add", "Sub", "Mul", "Div", "Sigmoid", "Clip", "Cast", "CastLike", "ChannelNorm", "Identity"),
    *("Concat", "Slice", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Split", "Gather"),
    *("Sqrt", "ReduceL2", "ReduceSum", "Max", "Min", "Pow", "Expand", "Reciprocal"),
}
_UNUSED = {"Constant", "Shape"}


@dataclass(frozen=True, kw_only=True)
class Reach:
    """Border of a tile in elements of the graph's input: before it and behind it.

    Attributes:
        rows: above and below.
        columns: to the left and to the right.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def border(self) -> int:
        """The widest of the four."""
        return max(*self.rows, *self.columns)


def tile_border(name: str, model: ir.Model, spatial_stride: int) -> int | None:
    """Latent rows and columns around a tile that its inner part depends on.

    Args:
        name: of the component.
        model: its graph.
        spatial_stride: rows of the video for one of the latent.

    Returns:
        The border, or None for a component that needs whole frames.

    Raises:
        WanxError: as :func:`reach`.
    """
    if name.startswith("vae_decoder_up"):
        return reach(model, "features", "video", spatial_stride).border
    if name.startswith("vae_encoder_down"):
        return -(-reach(model, "video", "features", 1 / spatial_stride).border // spatial_stride)
    return None


def reach(model: ir.Model, tiled: str, output: str, scale: float) -> Reach:
    """Find the border that a tile of a graph needs.

    Args:
        model: whose values have their rows and columns last.
        tiled: input that is cut into tiles; caches are cut at the same places.
        output: whose elements are to be exact.
        scale: rows of the output for one of the input; below 1 where a graph makes less.

    Raises:
        WanxError: an operator mixes places in a way that is not known.
    """
    outputs = {value.name: value for value in model.graph.outputs}
    # One element of the coarser of the two.
    size, inner = (int(scale), 1) if scale >= 1 else (1, round(1 / scale))
    needed: dict[ir.Value, Area] = {outputs[output]: ((0, size), (0, size))}
    for node in reversed(list(model.graph)):
        wanted = [needed[value] for value in node.outputs if value in needed]
        if not wanted or node.op_type in _UNUSED:
            continue
        area = _union(wanted)
        for value, part in _inputs_of(node, area):
            needed[value] = _union([needed[value], part]) if value in needed else part
    source = next(value for value in model.graph.inputs if value.name == tiled)
    (top, bottom), (left, right) = needed[source]
    return Reach(rows=(-top, bottom - inner), columns=(-left, right - inner))


def _inputs_of(node: ir.Node, area: Area) -> list[tuple[ir.Value, Area]]:
    """Inputs of a node with the area that they are needed in."""
    first = node.inputs[0]
    assert first is not None
    if node.op_type == "Conv":
        return [(first, _convolved(node, area))]
    if node.op_type == "Resize":
        return [(first, _resized(node, area))]
    if node.op_type == "Pad":
        return [(first, _padded(node, area))]
    if node.op_type not in _LOCAL:
        raise WanxError(
            f"{node.op_type} ({node.name or node.outputs[0].name}) mixes places of a frame, so the "
            "graph cannot be cut into tiles"
        )
    return [(value, area) for value in node.inputs if value is not None and _is_map(value)]


def _is_map(value: ir.Value) -> bool:
    """True for a value that has rows and columns: one that is not a constant."""
    producer = value.producer()
    return value.const_value is None and (producer is None or producer.op_type not in _UNUSED)


def _convolved(node: ir.Node, area: Area) -> Area:
    weight = node.inputs[1]
    assert weight is not None
    while (producer := weight.producer()) is not None and producer.op_type == "Cast":
        assert producer.inputs[0] is not None
        weight = producer.inputs[0]
    shape = weight.shape if weight.const_value is None else weight.const_value.shape
    assert shape is not None
    sides = [side for side in list(shape)[2:] if isinstance(side, int)]
    count = len(sides)
    strides = _integers(node, "strides", [1] * count)
    dilations = _integers(node, "dilations", [1] * count)
    pads = _integers(node, "pads", [0] * 2 * count)
    found = []
    for axis, (begin, end) in zip((count - 2, count - 1), area, strict=True):
        start = begin * strides[axis] - pads[axis]
        span = (sides[axis] - 1) * dilations[axis]
        found.append((start, (end - 1) * strides[axis] - pads[axis] + span + 1))
    return found[0], found[1]


def _resized(node: ir.Node, area: Area) -> Area:
    """Of enlarging by copying: rows and columns of which copies are needed."""
    mode, how = (
        node.attributes[name].as_string() for name in ("mode", "coordinate_transformation_mode")
    )
    scales = _constant(node, 2)
    if mode != "nearest" or how != "asymmetric" or scales is None:
        raise WanxError(f"Resize ({mode}, {how}) is not known well enough to cut it into tiles")
    factors = [float(factor) for factor in scales[-2:]]
    found = [
        (math.floor(begin / factor), math.floor((end - 1) / factor) + 1)
        for (begin, end), factor in zip(area, factors, strict=True)
    ]
    return found[0], found[1]


def _padded(node: ir.Node, area: Area) -> Area:
    amounts = _constant(node, 1)
    if amounts is None:
        raise WanxError("Pad by amounts that are no constants cannot be cut into tiles")
    before = [int(amount) for amount in amounts]
    rank = len(before) // 2
    found = [
        (begin - before[axis], end - before[axis])
        for axis, (begin, end) in zip((rank - 2, rank - 1), area, strict=True)
    ]
    return found[0], found[1]


def _constant(node: ir.Node, place: int) -> list[float] | None:
    """Numbers of a constant input; None if it is none."""
    value = node.inputs[place] if len(node.inputs) > place else None
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else [float(number) for number in tensor.numpy().flatten()]


def _integers(node: ir.Node, name: str, default: Sequence[int]) -> list[int]:
    attribute = node.attributes.get(name)
    return list(default) if attribute is None else list(attribute.as_ints())


def _union(areas: Sequence[Area]) -> Area:
    sides = [
        (min(area[axis][0] for area in areas), max(area[axis][1] for area in areas))
        for axis in (0, 1)
    ]
    return sides[0], sides[1]
