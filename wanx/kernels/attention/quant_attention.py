"""Multi-head attention on packed heads, with both products in FP8.

    p = softmax(scale · q̂ k̂ᵀ)        o = p̂ v̂        per head

where x̂ is x, quantised to float8_e4m3fn by its scale and dequantised. q and o ``[B, Lq, H·d]``,
k and v ``[B, Lk, H·d]``, all of one floating dtype; q_scale, k_scale and v_scale are scalars in
fp32. Weights p lie in 0…1, so their scale is 1/448. ``scale`` is 1/√d unless given. All arithmetic
runs in fp32. Rounding has no gradient, and neither has this op.

The ONNX function has a QuantizeLinear and a DequantizeLinear on each of the four operands, the form
that TensorRT turns into one FP8 kernel. Elsewhere it holds all Lq × Lk weights at once.

On a GPU the fastest backend of :mod:`wanx.kernels.attention.backends` for 8 bits runs. It has
scales of its own, of finer parts, which it finds while it runs.
"""

from __future__ import annotations

import torch
from onnxscript import opset23 as op
from onnxscript import script
from torch import Tensor
from torch.library import triton_op

from wanx.kernels.attention.backends import AttentionBackend, choose_backend
from wanx.kernels.launch import runs_reference
from wanx.kernels.quantize import E4M3_MAX, quantize_reference
from wanx.kernels.registry import DOMAIN, register

WEIGHT_SCALE = 1 / E4M3_MAX


def _rounded(x: Tensor, scale: Tensor) -> Tensor:
    return quantize_reference(x, scale, torch.float8_e4m3fn).float() * scale


def quant_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    num_heads: int,
    scale: float,
) -> Tensor:
    """Round the operands, attend in fp32 and return the result in the dtype of ``q``."""
    heads = [
        _rounded(t, t_scale).unflatten(-1, (num_heads, -1)).transpose(1, 2)
        for t, t_scale in ((q, q_scale), (k, k_scale), (v, v_scale))
    ]
    weights = torch.softmax(heads[0] @ heads[1].transpose(-2, -1) * scale, dim=-1)
    out = _rounded(weights, torch.tensor(WEIGHT_SCALE, device=q.device)) @ heads[2]
    return out.transpose(1, 2).flatten(-2).to(q.dtype)


@script(DOMAIN, default_opset=op)
def QuantAttention(q, k, v, q_scale, k_scale, v_scale, num_heads: int, scale: float):  # type: ignore[no-untyped-def]
    one = op.Constant(value_ints=[1])
    kept = op.Constant(value_ints=[0, 0])
    rest = op.Constant(value_ints=[-1])
    split = op.Concat(kept, op.Reshape(op.Constant(value_int=num_heads), one), rest, axis=0)
    q_heads = op.Transpose(op.Reshape(op.Cast(q, to=1), split), perm=[0, 2, 1, 3])
    k_heads = op.Transpose(op.Reshape(op.Cast(k, to=1), split), perm=[0, 2, 3, 1])
    v_heads = op.Transpose(op.Reshape(op.Cast(v, to=1), split), perm=[0, 2, 1, 3])
    q8 = op.QuantizeLinear(q_heads, q_scale, output_dtype=17)
    k8 = op.QuantizeLinear(k_heads, k_scale, output_dtype=17)
    v8 = op.QuantizeLinear(v_heads, v_scale, output_dtype=17)
    scores = op.MatMul(
        op.DequantizeLinear(q8, op.CastLike(q_scale, q)),
        op.DequantizeLinear(k8, op.CastLike(k_scale, q)),
    )
    weights = op.Softmax(op.Cast(scores, to=1) * op.Constant(value_float=scale), axis=-1)
    p_scale = op.Constant(value_float=WEIGHT_SCALE)
    p8 = op.QuantizeLinear(weights, p_scale, output_dtype=17)
    out = op.MatMul(
        op.DequantizeLinear(p8, op.CastLike(p_scale, q)),
        op.DequantizeLinear(v8, op.CastLike(v_scale, q)),
    )
    packed = op.Concat(kept, rest, axis=0)
    return op.Reshape(op.Transpose(out, perm=[0, 2, 1, 3]), packed)


@triton_op("wanx::quant_attention", mutates_args=())
def _quant_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    num_heads: int,
    scale: float,
) -> Tensor:
    backend = choose_backend(q, k, v, num_heads, bits=8)
    if isinstance(backend, AttentionBackend):
        return backend.run(q, k, v, num_heads, scale)
    runs_reference("quant_attention", backend, q)
    return quant_attention_reference(q, k, v, q_scale, k_scale, v_scale, num_heads, scale)


@_quant_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    num_heads: int,
    scale: float,
) -> Tensor:
    return torch.empty_like(q)


register(torch.ops.wanx.quant_attention.default, QuantAttention)


def quant_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    *,
    num_heads: int,
    scale: float | None = None,
) -> Tensor:
    """Attend from q to k and v in FP8; see the module's contract for shapes."""
    if scale is None:
        scale = float((q.shape[-1] // num_heads) ** -0.5)
    return _quant_attention(q, k, v, q_scale, k_scale, v_scale, num_heads, scale)
