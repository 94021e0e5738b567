"""What was really built: 8-bit layers are read back from the graph and from the weight files.

Nothing here trusts the code that quantised. A layer counts as 8-bit when its MatMul multiplies
8-bit operands, whatever it is called, and a stored weight is right when every number is the 8-bit
one nearest to its original.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass
from torch import Tensor

from wanx.errors import WanxError
from wanx.export.quantize import FLOATS, QuantizedTensor
from wanx.export.recipe import Recipe
from wanx.export.scheme import WEIGHT_ONLY
from wanx.models.tensor_source import SafetensorsTensor, TensorSource
from wanx.models.weights import some_of
from wanx.safetensors_file import TensorRef

_EIGHT_BITS = {ir.DataType.INT8: "int8", ir.DataType.FLOAT8E4M3FN: "fp8"}
# What the other operand's type may be: int8 can come shifted by 128.
_PARTNERS = {
    ir.DataType.INT8: (ir.DataType.INT8, ir.DataType.UINT8),
    ir.DataType.FLOAT8E4M3FN: (ir.DataType.FLOAT8E4M3FN,),
}
_PASSED = ("Cast", "CastLike", "Transpose", "Identity", "Reshape")
_SPOT_BYTES = 1 << 20
_SLACK = 1e-3  # of a step, for the rounding of scales and products in fp32


def eight_bit_layers(graph: Path, root: Path) -> dict[str, str]:
    """Name the 8-bit weights that a graph uses, each with what its operator multiplies.

    Args:
        graph: the ONNX file.
        root: the folder that its locations of weights are relative to.

    Returns:
        By tensor name: ``int8`` or ``fp8`` where the other operand has the same 8 bits with a
        fixed scale, ``fp8 dynamic`` where its scale is found while running, ``int8-weight`` where
        it is not quantised or the weight is a table.
    """
    return {name: kind for name, kind, _ in _layers(graph, root)}


def _layers(graph: Path, root: Path) -> Iterator[tuple[str, str, float | None]]:
    """Yield weight, kind and static input scale of every layer with an 8-bit weight."""
    model = ir.load(graph)
    model = InlinePass()(model).model
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value.base_dir = root
    for node in model.graph.all_nodes():
        if node.op_type == "Gather":
            weight = _weight(node.inputs[0])
            if weight is not None:
                yield weight.name or "", WEIGHT_ONLY, None
        elif node.op_type == "MatMulIntegerToFloat":
            weight = _weight(node.inputs[1])
            if weight is not None:
                yield weight.name or "", *_kind(weight, node.inputs[0], node.inputs[2])
        elif node.op_type in ("MatMul", "Gemm"):
            for index in (1, 0):
                weight = _weight(node.inputs[index])
                if weight is not None:
                    yield weight.name or "", *_kind(weight, node.inputs[1 - index])
                    break


def _kind(
    weight: ir.Value, other: ir.Value | None, scale: ir.Value | None = None
) -> tuple[str, float | None]:
    """Say what a product multiplies; ``scale`` is that of an input that stays in 8 bits."""
    assert weight.dtype is not None
    number = _EIGHT_BITS[weight.dtype]
    step, value = _initializer(scale), other
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "DequantizeLinear":
            step = _initializer(node.inputs[1])
        elif node.op_type == "QuantizeLinear":
            if _quantized_type(node) not in _PARTNERS[weight.dtype]:
                break
            if step is not None and _initializer(node.inputs[1]) is step:
                assert step.const_value is not None
                return number, float(step.const_value.numpy())
            return f"{number} dynamic", None
        elif node.op_type not in _PASSED:
            break
        value = node.inputs[0]
    return f"{number}-weight", None


def _quantized_type(node: ir.Node) -> ir.DataType | None:
    if "output_dtype" in node.attributes and node.attributes["output_dtype"].as_int():
        return ir.DataType(node.attributes["output_dtype"].as_int())
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    return None if zero is None else zero.dtype


def _weight(value: ir.Value | None) -> ir.Value | None:
    """The 8-bit initialiser that a value is made of by casts, transposes and scales."""
    value = _initializer(value, (*_PASSED, "DequantizeLinear"))
    return value if value is not None and value.dtype in _EIGHT_BITS else None


def _initializer(value: ir.Value | None, passed: tuple[str, ...] = _PASSED) -> ir.Value | None:
    """The initialiser that a value is made of by nodes of some types alone."""
    while value is not None and not value.is_initializer():
        node = value.producer()
        value = node.inputs[0] if node is not None and node.op_type in passed else None
    return value


def require_recipe(component: str, graph: Path, root: Path, recipe: Recipe) -> dict[str, int]:
    """Compare the 8-bit layers of a built graph with the recipe.

    Returns:
        How many layers there are of each kind.

    Raises:
        WanxError: a layer is missing, of another kind, has another scale, or is not in the recipe.
    """
    wanted: dict[str, tuple[str, float | None]] = {}
    dynamic = recipe.options.activation_scale == "dynamic" and recipe.scheme.name != WEIGHT_ONLY
    for name in (*recipe.layers, *recipe.embeddings):
        kind = f"{recipe.scheme.name} dynamic" if dynamic else recipe.scheme.name
        wanted[f"{name}.weight"] = kind, recipe.layers.get(name)
    found = {name: (kind, scale) for name, kind, scale in _layers(graph, root)}
    wrong = []
    for name in sorted(wanted.keys() | found.keys()):
        want, have = wanted.get(name), found.get(name)
        if want is None or have is None or want[0] != have[0]:
            wrong.append(f"{name} is {_said(have)} instead of {_said(want)}")
        elif want[1] is not None and np.float32(want[1]) != np.float32(have[1]):
            wrong.append(f"{name} has the input scale {have[1]:.6g} instead of {want[1]:.6g}")
    if wrong:
        raise WanxError(
            f"{component} was not quantised as the recipe says: {some_of(wrong)}; this is a fault "
            "of wanx, please report it"
        )
    return dict(Counter(kind for kind, _ in found.values()))


def _said(layer: tuple[str, float | None] | None) -> str:
    return "not 8-bit" if layer is None else layer[0]


def require_nearest(
    sources: Mapping[str, TensorSource], written: Mapping[str, TensorRef], recipe: Recipe
) -> None:
    """Check the first megabyte of every quantised weight against its original.

    Every stored number times its scale must be within half a step of the original, and the largest
    number of a row must use the format's whole range.

    Args:
        sources: of the weights, some of them quantised.
        written: where the tensors of the bundle lie, scales among them.
        recipe: what they were quantised by.

    Raises:
        WanxError: names the weights that are wrong.
    """
    wrong = []
    for name in sorted(recipe.weights):
        source = sources[name]
        assert isinstance(source, QuantizedTensor)
        original = _first_rows(source.source)
        if source.smooth is not None:
            original = original * source.smooth
        stored = _stored_rows(written[name], len(original), source.scheme.dtype)
        scale = _read(written[f"{name}_scale"], torch.float32)
        scale = scale if scale.dim() == 0 else scale[: len(original), None]
        if not _is_nearest(original, stored, scale, source):
            wrong.append(name)
    if wrong:
        raise WanxError(
            f"{len(wrong)} weights do not match their scales: {some_of(wrong)}; this is a fault "
            "of wanx or of the disk, export again and report it if it stays"
        )


def _is_nearest(original: Tensor, stored: Tensor, scale: Tensor, source: QuantizedTensor) -> bool:
    units = original / scale
    if source.scheme.dtype == torch.int8:
        half_step = torch.full_like(units, 0.5)
    else:
        # E4M3: three bits of mantissa, and below 2^-6 steps of 2^-9.
        _, exponent = torch.frexp(units.abs().clamp_min(2.0**-6))
        half_step = torch.ldexp(torch.ones(()), exponent - 5)
    if ((stored - units).abs() > half_step * (1 + _SLACK) + _SLACK * half_step.amin()).any():
        return False
    largest = stored.abs().amax(dim=1)
    if source.per_tensor:
        return True  # the largest number may lie further on
    zero = original.abs().amax(dim=1) < 1e-30
    return bool(((largest >= 0.99 * source.scheme.limit) | zero).all())


def _first_rows(source: TensorSource) -> Tensor:
    row = source.nbytes // source.shape[0]
    piece = next(source.iter_bytes(max(1, _SPOT_BYTES // row) * row))
    return torch.frombuffer(piece, dtype=FLOATS[source.dtype]).view(-1, source.shape[1]).float()


def _stored_rows(ref: TensorRef, rows: int, dtype: torch.dtype) -> Tensor:
    piece = next(SafetensorsTensor.from_ref(ref).iter_bytes(rows * ref.shape[1]))
    return torch.frombuffer(piece, dtype=dtype).view(rows, -1).float()


def _read(ref: TensorRef, dtype: torch.dtype) -> Tensor:
    data = b"".join(SafetensorsTensor.from_ref(ref).iter_bytes())
    return torch.frombuffer(bytearray(data), dtype=dtype).view(ref.shape)
