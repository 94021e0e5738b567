"""Normalisation over the channels, as the VAE has it.

    y = x / max(‖x‖₂, 1e-12) · √C · weight          over dimension 1

x ``[B, C, ...]``, weight ``[C, 1, ...]``. Computed in fp32 as x · weight / √max(mean x², eps),
which is the same number for eps = 1e-24 / C with one reduction and no division; y has the dtype
of x.
"""

from __future__ import annotations

import torch
from onnxscript import opset23 as op
from onnxscript import script
from torch import Tensor
from torch.library import triton_op

from wanx.kernels.registry import DOMAIN, needs_gradient, register


def channel_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise in fp32 and return in the dtype of ``x``."""
    x32 = x.float()
    inverse = torch.rsqrt(x32.square().mean(1, keepdim=True).clamp_min(eps))
    return (x32 * inverse * weight.float()).to(x.dtype)


@script(DOMAIN, default_opset=op)
def ChannelNorm(x, weight, eps: float):  # type: ignore[no-untyped-def]
    x32 = op.Cast(x, to=1)
    channels = op.Constant(value_ints=[1])
    square = op.ReduceMean(x32 * x32, channels, keepdims=1)
    inverse = op.Reciprocal(op.Sqrt(op.Max(square, op.Constant(value_float=eps))))
    return op.CastLike(x32 * inverse * op.Cast(weight, to=1), x)


@triton_op("wanx::channel_norm", mutates_args=())
def _channel_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return channel_norm_reference(x, weight, eps)


@_channel_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


register(torch.ops.wanx.channel_norm.default, ChannelNorm)


def channel_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Normalise ``x`` over its channels; see the module's contract for shapes."""
    eps = 1e-24 / x.shape[1]
    if needs_gradient(x, weight):
        return channel_norm_reference(x, weight, eps)
    return _channel_norm(x, weight, eps)
