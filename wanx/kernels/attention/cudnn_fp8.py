"""Multi-head attention on packed heads by cuDNN, with both products in FP8.

    o = softmax(scale · q̂ ĉᵀ) v̂        per head, c = k - k̄, k̄ the mean of k over its rows

where x̂ is x, rounded to e4m3 by one scale for the whole tensor and dequantised; the weights of
softmax, which lie in 0…1, are rounded by 1/448. Subtracting k̄ moves all scores of a query alike,
which softmax does not see. Blackwell returns o in the dtype of q. Hopper can only return e4m3, by
twice the scale of v: no mean of values is larger than the largest of them, but rounded weights may
add up to a little more than one.

q and o ``[B, Lq, H·d]``, k and v ``[B, Lk, H·d]``, all bf16 or fp16; d a multiple of 16 up to 128.
Scales for whole tensors and results in e4m3 cost accuracy: cosines are 0.998 with normally
distributed q, k and v.

The graph is that of the tests and of the documentation of ``nvidia-cudnn-frontend`` (``sdpa_fp8``,
docs/operations/Attention.md). This file was written from them: what runs on a GPU is exercised by
tests marked ``gpu`` alone, the rest with a module in its place.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from wanx.kernels.launch import sm_of, unsupported_tensors
from wanx.kernels.quantize import E4M3_MAX, SMALLEST_AMAX, quantize

E4M3 = torch.float8_e4m3fn
# Numbers of the graph's tensors.
_SCALES = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
_UID = {name: uid for uid, name in enumerate(("q", "k", "v", *_SCALES, "o", "amax_o"), 1)}


@cache
def _cudnn() -> Any:
    """The frontend of cuDNN, or why there is none."""
    try:
        import cudnn
    except (ImportError, OSError) as error:
        return str(error)
    return cudnn


def unsupported_reason(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> str | None:
    """Reason why cuDNN's FP8 attention cannot run, or None."""
    if reason := unsupported_tensors(q, k, v, fp8=True, triton=False):
        return reason
    if not 90 <= (sm := sm_of(q)) < 120:
        return f"cuDNN attends in FP8 on SM90 to SM119, this GPU is SM{sm}"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.bfloat16, torch.float16):
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}"
    head = q.shape[-1] // num_heads
    if head > 128 or head % 16:
        return f"heads of {head} are no multiple of 16 up to 128"
    if isinstance(_cudnn(), str):
        return f"cuDNN's frontend is not installed ({_cudnn()}): pip install 'wanx[cudnn]'"
    return None


@torch.library.custom_op("wanx::attention_cudnn_fp8", mutates_args=())
def attention_cudnn_fp8(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
    """Attend, on tensors of which :func:`unsupported_reason` says nothing."""
    q8, q_scale = _rounded(q)
    k8, k_scale = _rounded(k - k.mean(1, keepdim=True))
    v8, v_scale = _rounded(v)
    narrow = sm_of(q) < 100
    one = torch.ones_like(v_scale)
    o_scale = 2 * v_scale if narrow else one
    out = q.new_empty(q.shape, dtype=E4M3 if narrow else q.dtype)
    operands = {
        "q": q8,
        "k": k8,
        "v": v8,
        "descale_q": q_scale,
        "descale_k": k_scale,
        "descale_v": v_scale,
        "descale_s": one / E4M3_MAX,
        "scale_s": one * E4M3_MAX,
        "scale_o": 1 / o_scale,
        "o": out,
        "amax_o": torch.empty_like(one),
    }
    batch, q_length, dim = q.shape
    sizes = batch, num_heads, q_length, k.shape[1], dim // num_heads
    graph, workspace = _plan(q.device, sizes, out.dtype, scale)
    graph.execute(
        {_UID[name]: tensor for name, tensor in operands.items()},
        torch.empty(workspace, dtype=torch.uint8, device=q.device),
        handle=_handle(q.device),
    )
    return (out.float() * o_scale.flatten()).to(q.dtype) if narrow else out


@attention_cudnn_fp8.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
    return q.new_empty(q.shape)


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round to e4m3; return that, with rows that lie together, and its scale ``[1, 1, 1, 1]``."""
    amax = torch.linalg.vector_norm(x, math.inf, dtype=torch.float32)
    scale = amax.clamp_min(SMALLEST_AMAX) / E4M3_MAX
    return quantize(x.contiguous(), scale, E4M3), scale.reshape(1, 1, 1, 1)


@cache
def _new_handle(device: torch.device) -> Any:
    return _cudnn().create_handle()


def _handle(device: torch.device) -> Any:
    """A handle that runs on the current stream."""
    handle = _new_handle(device)
    _cudnn().set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
    return handle


@cache
def _plan(
    device: torch.device,
    sizes: tuple[int, int, int, int, int],
    out_dtype: torch.dtype,
    scale: float,
) -> tuple[Any, int]:
    """The graph for batch, heads, queries, keys and width of a head, and its bytes of workspace."""
    cudnn = _cudnn()
    kinds = cudnn.data_type
    outs = {E4M3: kinds.FP8_E4M3, torch.bfloat16: kinds.BFLOAT16, torch.float16: kinds.HALF}
    batch, heads, queries, keys, head = sizes
    graph = cudnn.pygraph(
        io_data_type=kinds.FP8_E4M3,
        intermediate_data_type=kinds.FLOAT,
        compute_data_type=kinds.FLOAT,
        handle=_handle(device),
    )

    def layout(length: int) -> dict[str, tuple[int, ...]]:
        dim = (batch, heads, length, head)
        return {"dim": dim, "stride": (length * heads * head, head, heads * head, 1)}

    single = {"dim": (1, 1, 1, 1), "stride": (1, 1, 1, 1)}
    inputs = {
        name: graph.tensor(uid=_UID[name], data_type=kinds.FP8_E4M3, **layout(length))
        for name, length in (("q", queries), ("k", keys), ("v", keys))
    }
    for name in _SCALES:
        inputs[name] = graph.tensor(uid=_UID[name], data_type=kinds.FLOAT, **single)
    # The largest weight of softmax comes out too, but is known and stays inside the graph.
    o, _, _, amax_o = graph.sdpa_fp8(**inputs, attn_scale=scale, generate_stats=False)
    for name, tensor, shape, kind in (
        ("o", o, layout(queries), outs[out_dtype]),
        ("amax_o", amax_o, single, kinds.FLOAT),
    ):
        tensor.set_uid(_UID[name]).set_output(True).set_dim(shape["dim"])
        tensor.set_stride(shape["stride"]).set_data_type(kind)
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    return graph, graph.get_workspace_size()
