"""Quantisation of activations to 8 bits, symmetric around zero.

    q = saturate(round(x / scale))        to int8 or float8_e4m3fn, ties to even

:func:`quantize` has one static scale, a scalar in fp32; :func:`quantize_rows` computes one per row,
in e4m3 alone:

    scale = max(amax |x|, 448 · 2⁻¹²⁶) / 448

x ``[..., K]`` in any floating dtype, q of the same shape, the scales of rows ``[..., 1]`` in fp32.
The division runs in fp32. int8 saturates at -128 and 127, e4m3 at ±448; a NaN stays NaN in e4m3 and
becomes an arbitrary number in int8. Of a row that is not finite, at least one q or the scale is not
either. Rounding has no gradient, and neither have these ops.

A static scale is the standard node QuantizeLinear rather than a function: what follows it is
recognised by that name, and equal nodes of several readers become one.
"""

from __future__ import annotations

import torch
from onnxscript import opset23 as op
from onnxscript import script
from torch import Tensor

from wanx.kernels.registry import DOMAIN, Outputs, register, register_node

E4M3_MAX = 448.0
# The smallest amax whose scale is a normal number, so that x / scale is finite.
SMALLEST_AMAX = E4M3_MAX * 2.0**-126
RANGES = {torch.int8: (-128.0, 127.0), torch.float8_e4m3fn: (-E4M3_MAX, E4M3_MAX)}
ONNX_TYPES = {torch.int8: 3, torch.float8_e4m3fn: 17}


def quantize_reference(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Quantise ``x`` by a ``scale`` that broadcasts to it."""
    low, high = RANGES[dtype]
    y = (x.float() / scale.float()).clamp(low, high)
    return (y.round() if dtype == torch.int8 else y).to(dtype)


def quantize_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise each row of ``x`` to e4m3 by its own scale; return both."""
    x32 = x.float()
    scale = x32.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_AMAX) / E4M3_MAX
    return quantize_reference(x32, scale, torch.float8_e4m3fn), scale


@script(DOMAIN, default_opset=op)
def QuantizeRows(x):  # type: ignore[no-untyped-def]
    x32 = op.Cast(x, to=1)
    amax = op.ReduceMax(op.Abs(x32), op.Constant(value_ints=[-1]), keepdims=1)
    smallest = op.Constant(value_float=SMALLEST_AMAX)
    scale = op.Max(amax, smallest) / op.Constant(value_float=E4M3_MAX)
    q = op.QuantizeLinear(x32 / scale, op.Constant(value_float=1.0), output_dtype=17)
    return q, scale


@torch.library.custom_op("wanx::quantize", mutates_args=())
def _quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return quantize_reference(x, scale, dtype)


@_quantize.register_fake
def _(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


@torch.library.custom_op("wanx::quantize_rows", mutates_args=())
def _quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_rows_reference(x)


@_quantize_rows.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(x, dtype=torch.float8_e4m3fn),
        x.new_empty((*x.shape[:-1], 1), dtype=torch.float32),
    )


def _quantize_node(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.onnx.ops.symbolic(
        "QuantizeLinear",
        (x.float(), scale),
        {"output_dtype": ONNX_TYPES[dtype]},
        dtype=dtype,
        shape=x.shape,
        version=23,
    )


def _rows_outputs(x: Tensor) -> Outputs:
    return [(torch.float8_e4m3fn, x.shape), (torch.float32, (*x.shape[:-1], 1))]


register_node(torch.ops.wanx.quantize.default, _quantize_node)
register(torch.ops.wanx.quantize_rows.default, QuantizeRows, _rows_outputs)


def quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Quantise ``x`` by a static ``scale``; see the module's contract for shapes."""
    return _quantize(x, scale, dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise each row of ``x`` by its own scale; return both."""
    return _quantize_rows(x)
