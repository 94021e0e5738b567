"""Readback of 8-bit layers from the graph that was built.

Nothing here trusts the code that quantised. A layer counts as 8-bit when its MatMul multiplies
8-bit operands, whatever it is called.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from wanx.config.number_formats import QUANTIZED, UINT8
from wanx.errors import WanxError, abbreviate
from wanx.exporter.quantization.recipe import Recipe
from wanx.exporter.quantization.scheme import WEIGHT_ONLY

_EIGHT_BITS = {ir.DataType(row.onnx): row.name for row in QUANTIZED} | {
    ir.DataType(UINT8.onnx): "int8"
}
# What the other operand's type may be: int8 can come shifted by 128.
_PARTNERS = {dtype: (dtype,) for dtype in _EIGHT_BITS} | {
    ir.DataType.INT8: (ir.DataType.INT8, ir.DataType.UINT8)
}
_ATTENTION = "fp8 attention"
_PASSED = ("Cast", "CastLike", "Transpose", "Identity", "Reshape")


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """Computation of one layer with an 8-bit weight, or of one 8-bit attention, in a graph.

    Attributes:
        kind: as :func:`eight_bit_layers` says it.
        weight_scale: name of the tensor that its weight is multiplied by.
        input_scales: fixed scales of its inputs; an attention has those of q, k and v.
    """

    kind: str
    weight_scale: str | None = None
    input_scales: tuple[float, ...] = ()


_HIGH = _Layer(kind="not 8-bit")


def eight_bit_layers(graph: Path, root: Path) -> dict[str, str]:
    """Name the 8-bit weights that a graph uses, each with what its operator multiplies.

    Args:
        graph: the ONNX file.
        root: the folder that its locations of weights are relative to.

    Returns:
        By tensor name: ``int8`` or ``fp8`` where the other operand has the same 8 bits with a
        fixed scale, ``fp8 dynamic`` where its scale is found while running, ``int8-weight`` where
        it is not quantised or the weight is a table. By module name: ``fp8 attention``.
    """
    return {name: layer.kind for name, layer in _layers(graph, root).items()}


def _layers(graph: Path, root: Path) -> dict[str, _Layer]:
    model = ir.load(graph)
    model = InlinePass()(model).model
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value.base_dir = root
    layers: dict[str, _Layer] = {}
    attentions: dict[str, dict[str, float]] = {}
    for node in model.graph.all_nodes():
        if node.op_type == "Gather":
            weight, _ = _weight(node.inputs[0])
            if weight is not None:
                layers[_name(weight)] = _Layer(kind=WEIGHT_ONLY, weight_scale=_scale_of_rows(node))
        elif node.op_type == "MatMulIntegerToFloat":
            weight, _ = _weight(node.inputs[1])
            if weight is not None:
                scales = _initializer(node.inputs[3]), _initializer(node.inputs[2])
                layers[_name(weight)] = _layer(weight, scales[0], node.inputs[0], scales[1])
        elif node.op_type == "MatMulInteger":
            weight, _ = _weight(node.inputs[0])
            if weight is not None:
                layers[_name(weight)] = _layer(weight, _factor_behind(node), node.inputs[1])
        elif node.op_type in ("MatMul", "Gemm"):
            for index in (1, 0):
                weight, scale = _weight(node.inputs[index])
                if weight is not None:
                    layers[_name(weight)] = _layer(weight, scale, node.inputs[1 - index])
                    break
            else:
                _add_attention(attentions, node)
    for name, scales_of in attentions.items():
        input_scales_of_qkv = tuple(scales_of.get(letter, math.nan) for letter in "qkv")
        layers[name] = _Layer(kind=_ATTENTION, input_scales=input_scales_of_qkv)
    return layers


def _layer(
    weight: ir.Value, scale: ir.Value | None, x: ir.Value | None, step: ir.Value | None = None
) -> _Layer:
    """Say what a product multiplies; ``step`` is the scale of an input that stays in 8 bits."""
    assert weight.dtype is not None
    kind = _EIGHT_BITS[weight.dtype]
    scales: tuple[float, ...] = ()
    quantised, step = _quantised(x, _PARTNERS[weight.dtype], step)
    if not quantised:
        kind += "-weight"
    elif step is None:
        kind += " dynamic"
    else:
        scales = (_number(step),)
    name = None if scale is None else _name(scale)
    return _Layer(kind=kind, weight_scale=name, input_scales=scales)


def _add_attention(attentions: dict[str, dict[str, float]], product: ir.Node) -> None:
    """Note the scales of a product of two quantised activations: q kᵀ, or p v.

    The scale of p is a constant of the graph, and so tells the two apart.
    """
    fp8 = (ir.DataType.FLOAT8E4M3FN,)
    (left, first), (right, second) = (_quantised(value, fp8) for value in product.inputs[:2])
    if left and right and second is not None:
        name = _name(second).rpartition(".")[0]
        scales = {"v": second} if first is None else {"q": first, "k": second}
        attentions.setdefault(name, {}).update((key, _number(s)) for key, s in scales.items())


def _quantised(
    value: ir.Value | None, types: tuple[ir.DataType, ...], step: ir.Value | None = None
) -> tuple[bool, ir.Value | None]:
    """Check whether an operand was quantised to one of ``types``; return its scale if static."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "DequantizeLinear":
            step = _initializer(node.inputs[1])
        elif node.op_type == "QuantizeLinear":
            fixed = step is not None and _initializer(node.inputs[1]) is step
            return _quantised_type(node) in types, step if fixed else None
        elif node.op_type not in _PASSED:
            break
        value = node.inputs[0]
    return False, None


def _quantised_type(node: ir.Node) -> ir.DataType | None:
    if "output_dtype" in node.attributes and node.attributes["output_dtype"].as_int():
        return ir.DataType(node.attributes["output_dtype"].as_int())
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    return None if zero is None else zero.dtype


def _weight(value: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
    """The 8-bit initialiser that a value is made of, and the one that scales it."""
    scale = None
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "DequantizeLinear":
            scale = _initializer(node.inputs[1])
        elif node.op_type not in _PASSED:
            return None, None
        value = node.inputs[0]
    if value is None or not value.is_initializer() or value.dtype not in _EIGHT_BITS:
        return None, None
    return value, scale


def _scale_of_rows(gather: ir.Node) -> str | None:
    """Name of the tensor whose rows, looked up alike, multiply those of a table."""
    (use, *others) = gather.outputs[0].uses()
    while not others and use.node.op_type in (*_PASSED, "Sub"):
        (use, *others) = use.node.outputs[0].uses()
    if others or use.node.op_type != "Mul":
        return None
    factor = use.node.inputs[1 - use.idx]
    twin = None if factor is None else factor.producer()
    if twin is None or twin.op_type != "Gather" or twin.inputs[1] is not gather.inputs[1]:
        return None
    scale = _initializer(twin.inputs[0], (*_PASSED, "Unsqueeze"))
    return None if scale is None else _name(scale)


def _factor_behind(product: ir.Node) -> ir.Value | None:
    """The first initialiser that the result of a product is multiplied by."""
    reached = [product]
    for node in reached:
        for use in (use for output in node.outputs for use in output.uses()):
            if use.node.op_type == "Mul":
                factor = _initializer(use.node.inputs[1 - use.idx])
                if factor is not None:
                    return factor
            if use.node.op_type in (*_PASSED, "Split", "Mul", "Add") and use.node not in reached:
                reached.append(use.node)
    return None


def _initializer(value: ir.Value | None, passed: tuple[str, ...] = _PASSED) -> ir.Value | None:
    """The initialiser that a value is made of by nodes of some types alone."""
    while value is not None and not value.is_initializer():
        node = value.producer()
        value = node.inputs[0] if node is not None and node.op_type in passed else None
    return value


def _name(value: ir.Value) -> str:
    return value.name or ""


def _number(scale: ir.Value) -> float:
    assert scale.const_value is not None
    return float(scale.const_value.numpy())


def require_recipe(component: str, graph: Path, root: Path, recipe: Recipe) -> dict[str, int]:
    """Compare the 8-bit layers and attentions of a built graph with the recipe.

    Returns:
        How many there are of each kind.

    Raises:
        WanxError: one is missing, of another kind, has another scale, or is not in the recipe.
    """
    kind: str = recipe.scheme.name
    if recipe.options.activation_scale == "dynamic" and kind != WEIGHT_ONLY:
        kind += " dynamic"
    expected: dict[str, _Layer] = {}
    for name in (*recipe.layers, *recipe.embeddings):
        scale, weight = recipe.layers.get(name), f"{name}.weight"
        scales = () if scale is None else (scale,)
        expected[weight] = _Layer(kind=kind, weight_scale=f"{weight}_scale", input_scales=scales)
    for name, of_qkv in recipe.attention.items():
        expected[name] = _Layer(kind=_ATTENTION, input_scales=of_qkv)
    built = _layers(graph, root)
    names = sorted(expected.keys() | built.keys())
    wrong = [
        f"{name} {fault}"
        for name in names
        if (fault := _fault(expected.get(name, _HIGH), built.get(name, _HIGH)))
    ]
    if wrong:
        raise WanxError(
            f"{component} was not quantised as the recipe says: {abbreviate(wrong)}; this is a "
            "fault of wanx, please report it"
        )
    return dict(Counter(layer.kind for layer in built.values()))


def _fault(want: _Layer, have: _Layer) -> str:
    """Say how a layer differs from what is expected; empty where it does not."""
    if have.kind != want.kind:
        return f"is {have.kind} instead of {want.kind}"
    if have.weight_scale != want.weight_scale:
        return f"is scaled by {have.weight_scale or 'nothing'} instead of {want.weight_scale}"
    if _in_fp32(have) != _in_fp32(want):
        scales = (", ".join(f"{s:.6g}" for s in it.input_scales) for it in (have, want))
        return "has the input scale {} instead of {}".format(*scales)
    return ""


def _in_fp32(layer: _Layer) -> list[float]:
    return [float(np.float32(scale)) for scale in layer.input_scales]
