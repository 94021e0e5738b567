"""Adaptive layer normalisation.

    y = LN(x) · (1 + scale) + shift        LN(x) = (x - mean) / √(variance + eps), per token

x ``[B, L, D]``; scale and shift ``[B, 1, D]`` in fp32. The statistics and the modulation run in
fp32; y has the shape and dtype of x.
"""

from __future__ import annotations

import torch
from onnxscript import opset23 as op
from onnxscript import script
from torch import Tensor
from torch.nn import functional as F

from wanx.kernels.registry import DOMAIN, needs_gradient, register


def adaln_reference(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Compute AdaLN in fp32 and return it in the dtype of ``x``."""
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return (normed * (1 + scale.float()) + shift.float()).to(x.dtype)


@script(DOMAIN, default_opset=op)
def AdaLN(x, scale, shift, eps: float):  # type: ignore[no-untyped-def]
    x32 = op.Cast(x, to=1)
    one = op.Constant(value_float=1.0)
    ones = op.Expand(one, op.Shape(x, start=-1))
    normed = op.LayerNormalization(x32, ones, axis=-1, epsilon=eps)
    return op.CastLike(normed * (scale + one) + shift, x)


@torch.library.custom_op("wanx::adaln", mutates_args=())
def _adaln(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    return adaln_reference(x, scale, shift, eps)


@_adaln.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


register(torch.ops.wanx.adaln.default, AdaLN)


def adaln(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float) -> Tensor:
    """Normalise and modulate ``x``; see the module's contract for shapes."""
    if needs_gradient(x, scale, shift):
        return adaln_reference(x, scale, shift, eps)
    return _adaln(x, scale, shift, eps)
