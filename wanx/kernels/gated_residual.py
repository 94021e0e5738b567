"""Gated residual update.

    out = x + y · gate

x ``[B, L, D]`` is the residual stream in fp32, y ``[B, L, D]`` the output of a sublayer in the
compute dtype, gate ``[B, 1, D]`` in fp32. The sum runs in fp32; out has the dtype of x.
"""

from __future__ import annotations

import torch
from onnxscript import opset23 as op
from onnxscript import script
from torch import Tensor

from wanx.kernels.registry import DOMAIN, needs_gradient, register


def gated_residual_reference(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Compute the update in fp32 and return it in the dtype of ``x``."""
    return (x.float() + y.float() * gate.float()).to(x.dtype)


@script(DOMAIN, default_opset=op)
def GatedResidual(x, y, gate):  # type: ignore[no-untyped-def]
    x32 = op.Cast(x, to=1)
    return op.CastLike(x32 + op.Cast(y, to=1) * gate, x)


@torch.library.custom_op("wanx::gated_residual", mutates_args=())
def _gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
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
