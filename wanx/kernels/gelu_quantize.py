"""GELU by tanh, quantised to 8 bits, between the two linears of a feed-forward network.

    y = saturate(round(gelu(x) / scale))        gelu(x) = ½ x (1 + tanh(√(2/π)(x + 0.044715 x³)))

x ``[..., K]`` in any floating dtype; y of the same shape in int8 or float8_e4m3fn, rounded as in
:mod:`wanx.kernels.quantize`, whose kernel this runs. scale is a scalar in fp32 in
:func:`gelu_quantize`; :func:`gelu_quantize_rows` finds one for each row, and returns them
``[..., 1]``, in e4m3 alone. Everything before the rounding runs in fp32. Rounding has no gradient,
and neither have these ops.

Below about -4, 1 + tanh cancels in fp32, and PyTorch's gelu, on which the references stand, loses
up to 2e-7 there. The kernel computes x · sigmoid(2u), u the argument of tanh, and does not cancel.
"""

from __future__ import annotations

import torch
from onnxscript import opset23 as op
from onnxscript import script
from torch import Tensor
from torch.library import triton_op
from torch.nn import functional as F

from wanx.kernels.launch import runs_reference
from wanx.kernels.quantize import (
    E4M3_MAX,
    SMALLEST_AMAX,
    launch_quantize,
    quantize_reference,
    quantize_rows_reference,
    unsupported_reason,
)
from wanx.kernels.registry import DOMAIN, Outputs, register

E4M3 = torch.float8_e4m3fn


def gelu_quantize_reference(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute GELU in fp32 and quantise it by ``scale``."""
    return quantize_reference(F.gelu(x.float(), approximate="tanh"), scale, dtype)


def gelu_quantize_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute GELU in fp32 and quantise each row to e4m3 by its own scale; return both."""
    return quantize_rows_reference(F.gelu(x.float(), approximate="tanh"))


@script(DOMAIN, default_opset=op)
def GeluQuantize(x, scale, dtype: int):  # type: ignore[no-untyped-def]
    y = op.Gelu(op.Cast(x, to=1), approximate="tanh")
    return op.QuantizeLinear(y, scale, output_dtype=dtype)


@script(DOMAIN, default_opset=op)
def GeluQuantizeRows(x):  # type: ignore[no-untyped-def]
    y = op.Gelu(op.Cast(x, to=1), approximate="tanh")
    amax = op.ReduceMax(op.Abs(y), op.Constant(value_ints=[-1]), keepdims=1)
    smallest = op.Constant(value_float=SMALLEST_AMAX)
    rows = op.Max(amax, smallest) / op.Constant(value_float=E4M3_MAX)
    one = op.Constant(value_float=1.0)
    return op.QuantizeLinear(y / rows, one, output_dtype=17), rows


@triton_op("wanx::gelu_quantize", mutates_args=())
def _gelu_quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    reason = unsupported_reason(x, scale, fp8=dtype == E4M3)
    if runs_reference("gelu_quantize", reason, x):
        return gelu_quantize_reference(x, scale, dtype)
    return launch_quantize(x, scale, dtype, gelu=True)[0]


@_gelu_quantize.register_fake
def _(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


@triton_op("wanx::gelu_quantize_rows", mutates_args=())
def _gelu_quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    if runs_reference("gelu_quantize_rows", unsupported_reason(x, fp8=True), x):
        return gelu_quantize_rows_reference(x)
    return launch_quantize(x, None, E4M3, gelu=True)


@_gelu_quantize_rows.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(x, dtype=E4M3),
        x.new_empty((*x.shape[:-1], 1), dtype=torch.float32),
    )


def _outputs(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Outputs:
    return [(dtype, x.shape)]


def _rows_outputs(x: Tensor) -> Outputs:
    return [(E4M3, x.shape), (torch.float32, (*x.shape[:-1], 1))]


register(torch.ops.wanx.gelu_quantize.default, GeluQuantize, _outputs)
register(torch.ops.wanx.gelu_quantize_rows.default, GeluQuantizeRows, _rows_outputs)


def gelu_quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Quantise the GELU of ``x`` by a static ``scale``; see the module's contract for shapes."""
    return _gelu_quantize(x, scale, dtype)


def gelu_quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise the GELU of each row of ``x`` by its own scale; return both."""
    return _gelu_quantize_rows(x)
