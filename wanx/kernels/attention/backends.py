"""Backends of attention on GPUs, and the choice among them.

Each takes q ``[B, Lq, H·d]``, k and v ``[B, Lk, H·d]`` in bf16 or fp16 and returns o like q. Those
of 16 bits round like a product in that type; those of 8 bits keep a cosine of 0.999 with it, and
``cudnn-fp8`` one of 0.998.

The first in the order of :mod:`wanx.kernels.launch_config` that can run does. ``fa3`` and
``cudnn-fp8`` need packages of their own, and stand behind the others until they are measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from wanx.kernels.attention import cudnn_fp8, eight_bit, fa3, flash
from wanx.kernels.launch import sm_of, unsupported_tensors
from wanx.kernels.launch_config import backend_ranking

Run = Callable[[Tensor, Tensor, Tensor, int, float], Tensor]


@dataclass(frozen=True, kw_only=True)
class AttentionBackend:
    """One implementation.

    Attributes:
        name: what reports call it.
        bits: of its operands, 16 or 8.
        unsupported_reason: of q, k, v and the number of heads; None where it can run.
        run: of q, k, v, the number of heads and the scale of scores.
    """

    name: str
    bits: int
    unsupported_reason: Callable[[Tensor, Tensor, Tensor, int], str | None]
    run: Run


def _torch_reason(max_head: int, oldest_sm: int) -> Callable[..., str | None]:
    def reason(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> str | None:
        if problem := unsupported_tensors(q, k, v, triton=False):
            return problem
        if q.dtype not in flash.HALVES:
            return f"q is {q.dtype}"
        head = q.shape[-1] // num_heads
        if head > max_head or head % 8:
            return f"heads of {head} are no multiple of 8 up to {max_head}"
        sm = sm_of(q)
        return f"it needs SM{oldest_sm} or newer, this GPU is SM{sm}" if sm < oldest_sm else None

    return reason


# PyTorch's own operators rather than the choice among them that scaled_dot_product_attention makes
# of the machine at hand: what is traced is what will run.
def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    operator = torch.ops.aten._scaled_dot_product_cudnn_attention
    out: Tensor = operator(q, k, v, None, False, 0.0, False, False, scale=scale)[0]
    return out


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    operator = torch.ops.aten._scaled_dot_product_flash_attention
    out: Tensor = operator(q, k, v, 0.0, False, False, scale=scale)[0]
    return out


def _torch_run(attend: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
        split = [t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v)]
        return attend(split[0], split[1], split[2], scale).transpose(1, 2).flatten(-2)

    return run


_ALL = (
    AttentionBackend(
        name="cudnn",
        bits=16,
        unsupported_reason=_torch_reason(128, 80),
        run=_torch_run(_cudnn),
    ),
    AttentionBackend(
        name="flash",
        bits=16,
        unsupported_reason=_torch_reason(256, 80),
        run=_torch_run(_flash),
    ),
    AttentionBackend(
        name="triton",
        bits=16,
        unsupported_reason=flash.unsupported_reason,
        run=flash.launch_attention,
    ),
    AttentionBackend(
        name="fa3",
        bits=16,
        unsupported_reason=fa3.unsupported_reason,
        run=fa3.attention_fa3,
    ),
    AttentionBackend(
        name="triton-8bit",
        bits=8,
        unsupported_reason=eight_bit.unsupported_reason,
        run=eight_bit.launch_attention_8bit,
    ),
    AttentionBackend(
        name="cudnn-fp8",
        bits=8,
        unsupported_reason=cudnn_fp8.unsupported_reason,
        run=cudnn_fp8.attention_cudnn_fp8,
    ),
)
BACKENDS = {backend.name: backend for backend in _ALL}


def ranked_backends(sm: int, *, bits: int, keys: int) -> list[AttentionBackend]:
    """Backends that keep at least ``bits``, in the order in which they are tried.

    Where 8 bits are enough, those of 16 bits come last, unless the table ranks them.
    """
    names = backend_ranking(sm, bits=bits, keys=keys)
    if bits == 8:
        names += backend_ranking(sm, bits=16, keys=keys)
    return [BACKENDS[name] for name in dict.fromkeys(names)]


def choose_backend(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, bits: int
) -> AttentionBackend | str:
    """The fastest backend that keeps at least ``bits``, or why there is none."""
    reasons: dict[str, str] = {}
    for backend in ranked_backends(sm_of(q), bits=bits, keys=k.shape[1]):
        reason = backend.unsupported_reason(q, k, v, num_heads)
        if reason is None:
            return backend
        reasons.setdefault(reason, backend.name)
    return "; ".join(f"{name}: {reason}" for reason, name in reasons.items())
