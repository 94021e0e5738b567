"""Implementations of attention on GPUs, and which of them runs.

Each takes q ``[B, Lq, H·d]``, k and v ``[B, Lk, H·d]`` in bf16 or fp16 and returns o like q. Those
of 16 bits round like a product in that type; those of 8 bits keep a cosine of 0.999 with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from wanx.kernels import attention_8bit, flash_attention
from wanx.kernels.launch import sm_of, unsupported_tensors

Run = Callable[[Tensor, Tensor, Tensor, int, float], Tensor]


@dataclass(frozen=True, kw_only=True)
class Provider:
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


def _torch_reason(largest_head: int, oldest_sm: int) -> Callable[..., str | None]:
    def reason(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> str | None:
        if found := unsupported_tensors(q, k, v, triton=False):
            return found
        if q.dtype not in flash_attention.HALVES:
            return f"q is {q.dtype}"
        head = q.shape[-1] // num_heads
        if head > largest_head or head % 8:
            return f"heads of {head} are no multiple of 8 up to {largest_head}"
        sm = sm_of(q)
        return f"it needs SM{oldest_sm} or newer, this GPU is SM{sm}" if sm < oldest_sm else None

    return reason


def _torch_run(backend: SDPBackend) -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
        heads = [t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v)]
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(*heads, scale=scale)
        return out.transpose(1, 2).flatten(-2)

    return run


PROVIDERS = (
    Provider(
        name="cudnn",
        bits=16,
        unsupported_reason=_torch_reason(128, 80),
        run=_torch_run(SDPBackend.CUDNN_ATTENTION),
    ),
    Provider(
        name="flash",
        bits=16,
        unsupported_reason=_torch_reason(256, 80),
        run=_torch_run(SDPBackend.FLASH_ATTENTION),
    ),
    Provider(
        name="triton",
        bits=16,
        unsupported_reason=flash_attention.unsupported_reason,
        run=flash_attention.launch_attention,
    ),
    Provider(
        name="triton-8bit",
        bits=8,
        unsupported_reason=attention_8bit.unsupported_reason,
        run=attention_8bit.launch_attention_8bit,
    ),
)
# Fastest first. cuDNN's kernels use what Hopper and Blackwell have, flash is written for Ampere.
_ORDER = {16: ("cudnn", "flash", "triton"), 8: ("triton-8bit",)}
_ORDER_BEFORE_HOPPER = {16: ("flash", "cudnn", "triton"), 8: ("triton-8bit",)}


def choose(q: Tensor, k: Tensor, v: Tensor, num_heads: int, bits: int) -> Provider | str:
    """The fastest provider that keeps at least ``bits``, or why there is none.

    Where 8 bits are enough and nothing runs in 8, one of 16 does.
    """
    order = _ORDER if sm_of(q) >= 90 else _ORDER_BEFORE_HOPPER
    names = order[16] if bits == 16 else (*order[8], *order[16])
    by_name = {provider.name: provider for provider in PROVIDERS}
    reasons: dict[str, str] = {}
    for name in names:
        reason = by_name[name].unsupported_reason(q, k, v, num_heads)
        if reason is None:
            return by_name[name]
        reasons.setdefault(reason, name)
    return "; ".join(f"{name}: {reason}" for reason, name in reasons.items())
