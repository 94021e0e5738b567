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
from torch.library import triton_op

from wanx.config.number_formats import FP8, QUANTIZED
from wanx.kernels.launch import (
    FLOATS,
    jit,
    launch,
    next_power_of_two,
    runs_reference,
    sm_of,
    tl,
    unsupported_tensors,
)
from wanx.kernels.launch_config import config
from wanx.kernels.registry import DOMAIN, ONNX_TYPES, Outputs, register, register_node

E4M3_MAX = FP8.largest
# The smallest amax whose scale is a normal number, so that x / scale is finite.
SMALLEST_AMAX = E4M3_MAX * 2.0**-126
LARGEST_ROW = 16384
RANGES = {getattr(torch, row.torch): (row.lowest, row.largest) for row in QUANTIZED}


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


def is_scale(tensor: Tensor) -> bool:
    """True if a kernel can read ``tensor`` as a static scale."""
    return tensor.numel() == 1 and tensor.dtype == torch.float32


def unsupported_reason(x: Tensor, *scales: Tensor, fp8: bool) -> str | None:
    """Reason why the kernel cannot run, or None."""
    if reason := unsupported_tensors(x, *scales, fp8=fp8):
        return reason
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}"
    if x.shape[-1] > LARGEST_ROW:
        return f"rows have {x.shape[-1]} numbers, above {LARGEST_ROW}"
    for scale in scales:
        if not is_scale(scale):
            return f"its scale {scale.dtype} {list(scale.shape)} is no scalar in fp32"
    return None if x.is_contiguous() else f"x {list(x.shape)} is not contiguous"


@jit
def round_to_8bit(y, element: tl.constexpr):  # type: ignore[no-untyped-def]
    """Round fp32 to ``element``, int8 or e4m3, ties to even; out of range saturates, NaN stays."""
    if element == tl.int8:
        y = tl.minimum(tl.maximum(y, -128.0), 127.0)
        # From 2²³ on fp32 has no fractions, so that adding 1.5 · 2²³ rounds to nearest even.
        return ((y + 12582912.0) - 12582912.0).to(tl.int8)
    y = tl.maximum(y, -448.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(y, 448.0, propagate_nan=tl.PropagateNan.ALL).to(element)


@jit
def row_scale_of(amax):  # type: ignore[no-untyped-def]
    """The scale of an e4m3 row, from its largest magnitude in fp32."""
    return tl.maximum(amax, 5.2662146917e-36) / 448.0  # 448 · 2⁻¹²⁶


@jit
def gelu_tanh(x):  # type: ignore[no-untyped-def]
    """GELU by tanh u = 2 sigmoid(2u) - 1, u = √(2/π)(x + 0.044715x³), in fp32."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@jit
def _quantize_kernel(  # type: ignore[no-untyped-def]
    x, scale, out, out_scale,
    K: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < K
    y = tl.load(x + row * K + column, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        y = gelu_tanh(y)
    if STATIC:
        step = tl.load(scale)
    else:
        step = row_scale_of(tl.max(tl.abs(y)))
        tl.store(out_scale + row, step)
    # A quotient, as 1 / step is infinite for the smallest steps.
    y = round_to_8bit(y / step, out.dtype.element_ty)
    tl.store(out + row * K + column, y, mask=inside)


def launch_quantize(
    x: Tensor, scale: Tensor | None, dtype: torch.dtype, *, gelu: bool = False
) -> tuple[Tensor, Tensor]:
    """Run the kernel on ``x``, or on its tanh-GELU; without ``scale`` each row gets its own.

    Returns:
        The numbers, and the scales of rows (empty where they share ``scale``).
    """
    k = x.shape[-1]
    out = torch.empty_like(x, dtype=dtype)
    rows = (*x.shape[:-1], 1) if scale is None else (0,)
    scales = x.new_empty(rows, dtype=torch.float32)
    count = x.numel() // k
    meta = config("gelu_quantize" if gelu else "quantize", sm_of(x), width=k, rows=count)
    # What a variant does not use is not looked at: any tensor will do in its place.
    launch(
        _quantize_kernel, (count,),
        x, scales if scale is None else scale, out, scales if scale is None else scale,
        K=k, BLOCK=next_power_of_two(k), GELU=gelu, STATIC=scale is not None, **meta,
    )  # fmt: skip
    return out, scales


@script(DOMAIN, default_opset=op)
def QuantizeRows(x):  # type: ignore[no-untyped-def]
    x32 = op.Cast(x, to=1)
    amax = op.ReduceMax(op.Abs(x32), op.Constant(value_ints=[-1]), keepdims=1)
    smallest = op.Constant(value_float=SMALLEST_AMAX)
    scale = op.Max(amax, smallest) / op.Constant(value_float=E4M3_MAX)
    q = op.QuantizeLinear(x32 / scale, op.Constant(value_float=1.0), output_dtype=17)
    return q, scale


@triton_op("wanx::quantize", mutates_args=())
def _quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    reason = unsupported_reason(x, scale, fp8=dtype == torch.float8_e4m3fn)
    if not runs_reference("quantize", reason, x):
        return launch_quantize(x, scale, dtype)[0]
    return quantize_reference(x, scale, dtype)


@_quantize.register_fake
def _(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


@triton_op("wanx::quantize_rows", mutates_args=())
def _quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    if not runs_reference("quantize_rows", unsupported_reason(x, fp8=True), x):
        return launch_quantize(x, None, torch.float8_e4m3fn)
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
