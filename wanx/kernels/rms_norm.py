"""Root-mean-square normalisation over the last dimension.

    y = x / √(mean(x²) + eps) · weight

x ``[..., D]``, weight ``[D]``. The mean and the product run in fp32; y has the dtype of x.
"""

from __future__ import annotations

import torch
from onnxscript import opset23 as op
from onnxscript import script
from torch import Tensor

from wanx.kernels.registry import DOMAIN, needs_gradient, register


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise in fp32 and return in the dtype of ``x``."""
    x32 = x.float()
    inverse = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * inverse * weight.float()).to(x.dtype)


@script(DOMAIN, default_opset=op)
def RMSNorm(x, weight, eps: float):  # type: ignore[no-untyped-def]
    normed = op.RMSNormalization(op.Cast(x, to=1), op.Cast(weight, to=1), axis=-1, epsilon=eps)
    return op.CastLike(normed, x)


@torch.library.custom_op("wanx::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
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
