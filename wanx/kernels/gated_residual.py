"""Gated residual update.

    out = x + y · gate

x ``[B, L, D]`` is the residual stream, y ``[B, L, D]`` the output of a sublayer in the compute
dtype, gate ``[B, 1, D]``, or ``[1, 1, D]`` for the whole batch, in fp32. The sum runs
in fp32; out has the dtype of x.
"""

from __future__ import annotations

import torch
from onnxscript import opset23 as op
from onnxscript import script
from torch import Tensor
from torch.library import triton_op

from wanx.kernels.adaln import unsupported_modulation
from wanx.kernels.launch import FLOATS, jit, launch, runs_reference, sm_of, tl, unsupported_tensors
from wanx.kernels.launch_config import config
from wanx.kernels.registry import DOMAIN, needs_gradient, register


def gated_residual_reference(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Compute the update in fp32 and return it in the dtype of ``x``."""
    return (x.float() + y.float() * gate.float()).to(x.dtype)


def unsupported_reason(x: Tensor, y: Tensor, gate: Tensor) -> str | None:
    """Reason why the kernel cannot run, or None."""
    if reason := unsupported_tensors(x, y, gate):
        return reason
    if x.dtype not in FLOATS or y.dtype not in FLOATS:
        return f"x is {x.dtype} and y {y.dtype}"
    if x.shape != y.shape:
        return f"x is {list(x.shape)} and y {list(y.shape)}"
    for tensor in (x, y):
        if not tensor.is_contiguous():
            return f"a tensor {list(tensor.shape)} is not contiguous"
    return unsupported_modulation(x, gate)


@jit
def _gated_residual_kernel(  # type: ignore[no-untyped-def]
    x, y, gate, out, length, gate_stride,
    D: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    weight = tl.load(gate + batch * gate_stride + column, mask=column < D, other=0.0)
    offsets = (batch.to(tl.int64) * length + token[:, None]) * D + column[None, :]
    inside = (token[:, None] < length) & (column[None, :] < D)
    value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    added = tl.load(y + offsets, mask=inside, other=0.0).to(tl.float32)
    value += added * weight[None, :]
    tl.store(out + offsets, value.to(out.dtype.element_ty), mask=inside)


def launch_gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Run the kernel."""
    batch, length, dim = x.shape
    out = torch.empty_like(x)
    meta = config("gated_residual", sm_of(x), dim=dim, length=length)
    launch(
        _gated_residual_kernel,
        (-(-length // meta["TOKENS"]), -(-dim // meta["BLOCK"]), batch),
        x, y, gate, out, length, 0 if gate.shape[0] == 1 else gate.stride(0), D=dim, **meta,
    )  # fmt: skip
    return out


@script(DOMAIN, default_opset=op)
def GatedResidual(x, y, gate):  # type: ignore[no-untyped-def]
    x32 = op.Cast(x, to=1)
    return op.CastLike(x32 + op.Cast(y, to=1) * gate, x)


@triton_op("wanx::gated_residual", mutates_args=())
def _gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    if not runs_reference("gated_residual", unsupported_reason(x, y, gate), x):
        return launch_gated_residual(x, y, gate)
    return gated_residual_reference(x, y, gate)


@_gated_residual.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return torch.empty_like(x)


register(torch.ops.wanx.gated_residual.default, GatedResidual)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Add ``y · gate`` to the residual stream; see the module's contract for shapes."""
    if needs_gradient(x, y, gate):
        return gated_residual_reference(x, y, gate)
    return _gated_residual(x, y, gate)
