"""Root-mean-square normalisation over the last dimension.

    y = x / √(mean(x²) + eps) · weight

x ``[..., D]``, weight ``[D]``. The mean and the product run in fp32; y has the dtype of x.
"""

from __future__ import annotations

import torch
from onnxscript import opset23 as op
from onnxscript import script
from torch import Tensor
from torch.library import triton_op

from wanx.kernels.launch import (
    FLOATS,
    jit,
    launch,
    next_power_of_two,
    runs_reference,
    tl,
    unsupported_tensors,
)
from wanx.kernels.registry import DOMAIN, needs_gradient, register

MAX_DIM = 16384


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise in fp32 and return in the dtype of ``x``."""
    x32 = x.float()
    inverse = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * inverse * weight.float()).to(x.dtype)


def unsupported_reason(x: Tensor, weight: Tensor) -> str | None:
    """Reason why the kernel cannot run, or None."""
    if reason := unsupported_tensors(x, weight):
        return reason
    if x.dtype not in FLOATS or weight.dtype not in FLOATS:
        return f"x is {x.dtype} and its weight {weight.dtype}"
    if x.shape[-1] > MAX_DIM:
        return f"D is {x.shape[-1]}, above {MAX_DIM}"
    if weight.shape != x.shape[-1:] or not weight.is_contiguous():
        return f"its weight {list(weight.shape)} does not belong to x {list(x.shape)}"
    return None if x.is_contiguous() else f"x {list(x.shape)} is not contiguous"


@jit
def _rms_norm_kernel(x, weight, out, eps, D: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    column = tl.arange(0, BLOCK)
    inside = column < D
    offsets = tl.program_id(0).to(tl.int64) * D + column
    value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    mean_square = tl.sum(value * value) / D
    y = value * tl.rsqrt(mean_square + tl.cast(eps, tl.float32)) * factor
    tl.store(out + offsets, y.to(out.dtype.element_ty), mask=inside)


def launch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Run the kernel."""
    dim = x.shape[-1]
    out = torch.empty_like(x)
    launch(
        _rms_norm_kernel, (x.numel() // dim,), x, weight, out, eps,
        D=dim, BLOCK=next_power_of_two(dim), num_warps=4 if dim <= 2048 else 8,
    )  # fmt: skip
    return out


@script(DOMAIN, default_opset=op)
def RMSNorm(x, weight, eps: float):  # type: ignore[no-untyped-def]
    normed = op.RMSNormalization(op.Cast(x, to=1), op.Cast(weight, to=1), axis=-1, epsilon=eps)
    return op.CastLike(normed, x)


@triton_op("wanx::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if not runs_reference("rms_norm", unsupported_reason(x, weight), x):
        return launch_rms_norm(x, weight, eps)
    return rms_norm_reference(x, weight, eps)


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


register(torch.ops.wanx.rms_norm.default, RMSNorm)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Normalise ``x`` over its last dimension; see the module's contract for shapes."""
    if needs_gradient(x, weight):
        return rms_norm_reference(x, weight, eps)
    return _rms_norm(x, weight, eps)
