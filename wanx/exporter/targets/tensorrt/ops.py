"""Table of the nodes that a TensorRT plug-in can take over, and their launchers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wanx.kernels.adaln import MAX_DIM, launch_adaln
from wanx.kernels.launch import FLOATS
from wanx.kernels.quantize import LARGEST_ROW, launch_quantize
from wanx.kernels.registry import ONNX_TYPES
from wanx.kernels.rms_norm_rope import launch_rms_norm_rope

_TORCH_TYPES = {number: dtype for dtype, number in ONNX_TYPES.items()}


@dataclass(frozen=True)
class Spec:
    """The dtype and the shape of an input; an axis that is not fixed has a name."""

    dtype: torch.dtype
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class Op:
    """Launcher of a ``wanx`` node of a graph.

    Attributes:
        run: launches the kernel on the node's inputs and attributes, and gives the node's outputs.
        unsupported_reason: says why it cannot, for inputs and attributes; None where it can.
    """

    run: Callable[..., tuple[Tensor, ...]]
    unsupported_reason: Callable[[Sequence[Spec], Mapping[str, Any]], str | None]


def _are_scales(specs: Sequence[Spec]) -> bool:
    return all(spec == Spec(torch.float32, ()) for spec in specs)


def _rms_norm_rope(
    q: Tensor, k: Tensor, *others: Tensor, num_heads: int, eps: float
) -> tuple[Tensor, ...]:
    q_weight, k_weight, cos, sin, *scales = others
    pair = (scales[0], scales[1]) if scales else None
    return launch_rms_norm_rope(q, k, q_weight, k_weight, cos, sin, num_heads, eps, pair)


def _unsupported_rope(inputs: Sequence[Spec], attributes: Mapping[str, Any]) -> str | None:
    q, k, q_weight, k_weight, cos, sin, *scales = inputs
    dim, heads = q.shape[-1], attributes["num_heads"]
    if not isinstance(dim, int) or dim % heads:
        return f"{dim} channels are not {heads} heads"
    head = dim // heads
    if head < 16 or head & (head - 1):
        return f"heads of {head} channels are no power of two from 16 on"
    if len(q.shape) != 3 or (k.dtype, k.shape) != (q.dtype, q.shape):
        return f"q is {q.dtype} {list(q.shape)} and k {k.dtype} {list(k.shape)}"
    if cos.dtype != torch.float32 or sin.dtype != torch.float32:
        return f"its tables are {cos.dtype} and {sin.dtype}"
    if q.dtype not in FLOATS or not _are_scales(scales):
        return f"q is {q.dtype}, and its scales {[list(scale.shape) for scale in scales]}"
    table, row = (q.shape[1], head // 2), (dim,)
    if {cos.shape, sin.shape} != {table} or {q_weight.shape, k_weight.shape} != {row}:
        return f"its tables are {list(cos.shape)} and its weights {list(q_weight.shape)}"
    return None


def _gelu_quantize(x: Tensor, scale: Tensor, *, dtype: int) -> tuple[Tensor, ...]:
    return launch_quantize(x, scale, _TORCH_TYPES[dtype], gelu=True)[:1]


def _unsupported_gelu(inputs: Sequence[Spec], attributes: Mapping[str, Any]) -> str | None:
    x, scale = inputs
    width = x.shape[-1] if x.shape else None
    if x.dtype not in FLOATS or not _are_scales([scale]):
        return f"x is {x.dtype}, and its scale {scale.dtype} {list(scale.shape)}"
    if not isinstance(width, int) or width > LARGEST_ROW:
        return f"rows have {width} numbers, above {LARGEST_ROW}"
    return None


def _adaln_quantize(
    x: Tensor, scale: Tensor, shift: Tensor, q_scale: Tensor, *, eps: float, dtype: int
) -> tuple[Tensor, ...]:
    outputs = launch_adaln(x, scale, shift, eps, dtype=_TORCH_TYPES[dtype], q_scale=q_scale)
    return outputs[1:2]


def _unsupported_adaln(inputs: Sequence[Spec], attributes: Mapping[str, Any]) -> str | None:
    x, *modulations, q_scale = inputs
    dim = x.shape[-1]
    if x.dtype not in FLOATS or not _are_scales([q_scale]):
        return f"x is {x.dtype}, and its scale {q_scale.dtype} {list(q_scale.shape)}"
    if len(x.shape) != 3 or not isinstance(dim, int) or dim > MAX_DIM:
        return f"x is {list(x.shape)}"
    for modulation in modulations:
        if modulation.shape not in ((1, 1, dim), (x.shape[0], 1, dim)):
            return f"a modulation {list(modulation.shape)} does not belong to x {list(x.shape)}"
        if modulation.dtype != torch.float32:
            return f"a modulation is {modulation.dtype}"
    return None


OPS = {
    "AdaLNQuantize": Op(run=_adaln_quantize, unsupported_reason=_unsupported_adaln),
    "RMSNormRope": Op(run=_rms_norm_rope, unsupported_reason=_unsupported_rope),
    "RMSNormRopeQuantize": Op(run=_rms_norm_rope, unsupported_reason=_unsupported_rope),
    "GeluQuantize": Op(run=_gelu_quantize, unsupported_reason=_unsupported_gelu),
}
