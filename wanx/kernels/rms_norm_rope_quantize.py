"""Full-row RMS normalisation and rotary embedding of queries and keys, quantised to e4m3.

    q8 = saturate(round(rope(norm(q)) / q_scale))        k8 alike

q, k, weights, cos and sin as in :mod:`wanx.kernels.rms_norm_rope`, whose kernel this runs; q_scale
and k_scale are scalars in fp32. Everything before the rounding runs in fp32; q8 and k8 are
float8_e4m3fn, rounded as in :mod:`wanx.kernels.quantize`. Rounding has no gradient, and neither has
this op.
"""

from __future__ import annotations

import torch
from onnxscript import opset23 as op
from onnxscript import script
from torch import Tensor
from torch.library import triton_op

from wanx.kernels.launch import runs_reference
from wanx.kernels.quantize import quantize_reference
from wanx.kernels.registry import DOMAIN, Outputs, register
from wanx.kernels.rms_norm_rope import (
    launch_rms_norm_rope,
    rms_norm_rope_reference,
    unsupported_reason,
)


def rms_norm_rope_quantize_reference(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Normalise and rotate in fp32 and quantise the results to e4m3."""
    q32, k32 = rms_norm_rope_reference(
        q.float(), k.float(), q_weight, k_weight, cos, sin, num_heads, eps
    )
    dtype = torch.float8_e4m3fn
    return quantize_reference(q32, q_scale, dtype), quantize_reference(k32, k_scale, dtype)


@script(DOMAIN, default_opset=op)
def RMSNormRopeQuantize(  # type: ignore[no-untyped-def]
    q, k, q_weight, k_weight, cos, sin, q_scale, k_scale, num_heads: int, eps: float
):
    batch_axis = op.Constant(value_ints=[0])
    cache = op.Concat(op.Shape(q, start=0, end=1), op.Shape(cos), axis=0)
    batch_cos = op.Expand(op.Unsqueeze(cos, batch_axis), cache)
    batch_sin = op.Expand(op.Unsqueeze(sin, batch_axis), cache)
    q_norm = op.RMSNormalization(op.Cast(q, to=1), op.Cast(q_weight, to=1), axis=-1, epsilon=eps)
    k_norm = op.RMSNormalization(op.Cast(k, to=1), op.Cast(k_weight, to=1), axis=-1, epsilon=eps)
    q_rope = op.RotaryEmbedding(q_norm, batch_cos, batch_sin, interleaved=1, num_heads=num_heads)
    k_rope = op.RotaryEmbedding(k_norm, batch_cos, batch_sin, interleaved=1, num_heads=num_heads)
    q8 = op.QuantizeLinear(q_rope, q_scale, output_dtype=17)
    return q8, op.QuantizeLinear(k_rope, k_scale, output_dtype=17)


@triton_op("wanx::rms_norm_rope_quantize", mutates_args=())
def _rms_norm_rope_quantize(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    others = (q_weight, k_weight, cos, sin, q_scale, k_scale)
    reason = unsupported_reason(q, k, *others, num_heads=num_heads)
    if runs_reference("rms_norm_rope_quantize", reason, q):
        return rms_norm_rope_quantize_reference(q, k, *others, num_heads, eps)
    return launch_rms_norm_rope(
        q, k, q_weight, k_weight, cos, sin, num_heads, eps, (q_scale, k_scale)
    )


@_rms_norm_rope_quantize.register_fake
def _(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    q8, k8 = (x.new_empty(x.shape, dtype=torch.float8_e4m3fn) for x in (q, k))
    return q8, k8


def _quantize_outputs(q: Tensor, k: Tensor, *_: object) -> Outputs:
    return [(torch.float8_e4m3fn, x.shape) for x in (q, k)]


register(torch.ops.wanx.rms_norm_rope_quantize.default, RMSNormRopeQuantize, _quantize_outputs)


def rms_norm_rope_quantize(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    *,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Normalise, rotate and quantise queries and keys; see the module's contract for shapes."""
    return _rms_norm_rope_quantize(
        q, k, q_weight, k_weight, cos, sin, q_scale, k_scale, num_heads, eps
    )
