"""A linear layer in 8 bits.

    y = (x8 · x_scale) (weight8 · weight_scale)ᵀ + bias

x8 ``[..., K]`` and weight8 ``[N, K]``, both int8 or both float8_e4m3fn; weight_scale ``[N]``, or
``[]`` for the whole tensor; bias ``[N]``; y ``[..., N]`` in the dtype of bias. x_scale is a scalar
in :func:`quant_linear` and ``[..., 1]``, one per row, in :func:`quant_linear_rows`. Scales are in
fp32. The reference accumulates in fp32.

On a GPU, e4m3 runs in PyTorch's own product where that can scale rows, and all else in
:mod:`wanx.kernels.gemm_8bit`.

The ONNX functions dequantise to the dtype of bias, the pattern that runtimes replace by an 8-bit
product; one that does not know it computes the same numbers in that dtype. DequantizeLinear has no
scale per row, so there the product is scaled instead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from onnxscript import opset23 as op
from onnxscript import script
from torch import Tensor
from torch.library import triton_op
from torch.nn import functional as F

from wanx.kernels import gemm_8bit
from wanx.kernels.launch import runs_reference, sm_of, unsupported_tensors
from wanx.kernels.launch_config import ranking
from wanx.kernels.registry import DOMAIN, Outputs, needs_gradient, register

Run = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def dequantized_weight(weight8: Tensor, weight_scale: Tensor) -> Tensor:
    """The weight ``[N, K]`` in fp32, around zero; its scale is ``[N]`` or ``[]``."""
    return weight8.float() * weight_scale.float().reshape(-1, 1)


def quant_linear_reference(
    x8: Tensor, x_scale: Tensor, weight8: Tensor, weight_scale: Tensor, bias: Tensor
) -> Tensor:
    """Compute either layer in fp32 and return it in the dtype of ``bias``."""
    x = x8.float() * x_scale.float()
    y = F.linear(x, dequantized_weight(weight8, weight_scale), bias.float())
    return y.to(bias.dtype)


@script(DOMAIN, default_opset=op)
def QuantLinear(x8, x_scale, weight8, weight_scale, bias):  # type: ignore[no-untyped-def]
    x = op.DequantizeLinear(x8, op.CastLike(x_scale, bias))
    weight = op.DequantizeLinear(weight8, op.CastLike(weight_scale, bias), axis=0)
    return op.MatMul(x, op.Transpose(weight, perm=[1, 0])) + bias


@script(DOMAIN, default_opset=op)
def QuantLinearRows(x8, x_scale, weight8, weight_scale, bias):  # type: ignore[no-untyped-def]
    x = op.DequantizeLinear(x8, op.CastLike(op.Constant(value_float=1.0), bias))
    weight = op.DequantizeLinear(weight8, op.CastLike(weight_scale, bias), axis=0)
    y = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
    return op.CastLike(op.Cast(y, to=1) * x_scale + op.Cast(bias, to=1), bias)


def _torch_reason(
    x8: Tensor, x_scale: Tensor, weight8: Tensor, weight_scale: Tensor, bias: Tensor
) -> str | None:
    """Reason why PyTorch's product cannot run, or None."""
    tensors = (x8, x_scale, weight8, weight_scale, bias)
    if reason := unsupported_tensors(*tensors, fp8=True, triton=False):
        return reason
    # torch._int_mm leaves its sums in int32, 4 bytes each, to be read again.
    if x8.dtype != gemm_8bit.E4M3 or weight8.dtype != gemm_8bit.E4M3:
        return f"x8 is {x8.dtype} and weight8 {weight8.dtype}"
    if bias.dtype != torch.bfloat16:
        return f"bias is {bias.dtype}"
    if any(size % 16 for size in weight8.shape):
        return f"weight8 {list(weight8.shape)} has sizes that are no multiples of 16"
    for tensor in (x8, weight8):
        if not tensor.is_contiguous() or tensor.storage_offset() % 16:
            return f"an operand {list(tensor.shape)} is not contiguous or not aligned"
    # Before Hopper cuBLAS scales whole tensors only.
    if sm_of(x8) < 90 and x_scale.numel() * weight_scale.numel() > 1:
        return f"scales of rows need SM90 or newer, this GPU is SM{sm_of(x8)}"
    return None


def _run_torch(
    x8: Tensor, x_scale: Tensor, weight8: Tensor, weight_scale: Tensor, bias: Tensor
) -> Tensor:
    n, k = weight8.shape
    x = x8.reshape(-1, k)
    if x_scale.numel() * weight_scale.numel() > 1:
        # PyTorch takes two scalars, or a scale for each row and column.
        dense = torch.contiguous_format
        x_scale = x_scale.reshape(-1, 1).expand(x.shape[0], 1).clone(memory_format=dense)
        weight_scale = weight_scale.reshape(1, -1).expand(1, n).clone(memory_format=dense)
    # Fast accumulation adds in the tensor cores alone, whose sums have some 22 bits.
    y = torch._scaled_mm(
        x, weight8.t(), x_scale, weight_scale, bias, out_dtype=bias.dtype, use_fast_accum=False
    )
    return y.view(*x8.shape[:-1], n)


def _run_triton(
    x8: Tensor, x_scale: Tensor, weight8: Tensor, weight_scale: Tensor, bias: Tensor
) -> Tensor:
    x = x8.reshape(-1, x8.shape[-1])
    y = gemm_8bit.launch_gemm_8bit(x, x_scale, weight8, weight_scale, bias)
    return y.view(*x8.shape[:-1], weight8.shape[0])


def _choose(
    x8: Tensor,
    x_scale: Tensor,
    weight8: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    op: str = "quant_linear",
) -> Run | str:
    """Choose the fastest product for an op on this GPU, or say why none can run."""
    values = (x8, x_scale, weight8, weight_scale, bias)
    n, k = weight8.shape
    choice: Run | str = ""
    for name in ranking(op, sm_of(x8), n=n, k=k):
        choice = candidate(name, *values)
        if not isinstance(choice, str):
            break
    return choice


def candidate(
    name: str, x8: Tensor, x_scale: Tensor, weight8: Tensor, weight_scale: Tensor, bias: Tensor
) -> Run | str:
    """The implementation ``torch`` or ``triton`` of the layer, or why it cannot run."""
    values = (x8, x_scale, weight8, weight_scale, bias)
    if name == "torch":
        return _torch_reason(*values) or _run_torch
    return gemm_8bit.unsupported_reason(*values) or _run_triton


def runs_triton(
    op: str, x8: Tensor, x_scale: Tensor, weight8: Tensor, weight_scale: Tensor, bias: Tensor
) -> bool:
    """True if our kernel computes the layer of an op, so that an epilogue can be part of it."""
    return _choose(x8, x_scale, weight8, weight_scale, bias, op) != _run_torch


@triton_op("wanx::quant_linear", mutates_args=())
def _quant_linear(
    x8: Tensor, x_scale: Tensor, weight8: Tensor, weight_scale: Tensor, bias: Tensor
) -> Tensor:
    run = _choose(x8, x_scale, weight8, weight_scale, bias)
    if not isinstance(run, str):
        return run(x8, x_scale, weight8, weight_scale, bias)
    runs_reference("quant_linear", run, x8)
    return quant_linear_reference(x8, x_scale, weight8, weight_scale, bias)


@triton_op("wanx::quant_linear_rows", mutates_args=())
def _quant_linear_rows(
    x8: Tensor, x_scale: Tensor, weight8: Tensor, weight_scale: Tensor, bias: Tensor
) -> Tensor:
    run = _choose(x8, x_scale, weight8, weight_scale, bias)
    if not isinstance(run, str):
        return run(x8, x_scale, weight8, weight_scale, bias)
    runs_reference("quant_linear_rows", run, x8)
    return quant_linear_reference(x8, x_scale, weight8, weight_scale, bias)


@_quant_linear.register_fake
@_quant_linear_rows.register_fake
def _(x8: Tensor, x_scale: Tensor, weight8: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    return bias.new_empty((*x8.shape[:-1], weight8.shape[0]))


def _outputs(
    x8: Tensor, x_scale: Tensor, weight8: Tensor, weight_scale: Tensor, bias: Tensor
) -> Outputs:
    return [(bias.dtype, (*x8.shape[:-1], weight8.shape[0]))]


register(torch.ops.wanx.quant_linear.default, QuantLinear, _outputs)
register(torch.ops.wanx.quant_linear_rows.default, QuantLinearRows, _outputs)


def quant_linear(
    x8: Tensor, x_scale: Tensor, weight8: Tensor, weight_scale: Tensor, bias: Tensor
) -> Tensor:
    """Apply the layer to an input of one scale; see the module's contract for shapes."""
    if needs_gradient(x_scale, weight_scale, bias):
        return quant_linear_reference(x8, x_scale, weight8, weight_scale, bias)
    return _quant_linear(x8, x_scale, weight8, weight_scale, bias)


def quant_linear_rows(
    x8: Tensor, x_scale: Tensor, weight8: Tensor, weight_scale: Tensor, bias: Tensor
) -> Tensor:
    """Apply the layer to an input of one scale per row; see the module's contract for shapes."""
    if needs_gradient(x_scale, weight_scale, bias):
        return quant_linear_reference(x8, x_scale, weight8, weight_scale, bias)
    return _quant_linear_rows(x8, x_scale, weight8, weight_scale, bias)
