"""Peaks of a GPU: square matrix products by PyTorch's libraries, and a copy."""

from __future__ import annotations

from collections.abc import Callable

import torch

from wanx.kernels.timing import interleaved, medians

BF16, FP8, INT8, COPY = "bf16 GEMM", "fp8 GEMM", "int8 GEMM", "copy"
EXACT_FP8 = "fp8 GEMM, sums in fp32"
SIDE = 8192  # of the matrices
COPIED = 2 << 30  # bytes
_NUMBER_FORMATS = {BF16: "high", FP8: "fp8", INT8: "int8"}


def peak_calls(
    device: torch.device, side: int = SIDE, copied: int = COPIED
) -> dict[str, Callable[[], object]]:
    """Calls whose speed is the device's peak, by name.

    A product of ``[side, side]`` matrices takes ``2 * side**3`` operations; the copy reads and
    writes ``copied`` bytes.
    """

    def noise(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    a, b = (noise(torch.bfloat16, side, side) for _ in range(2))
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    a_int, b_int = (
        torch.randint(-127, 128, (side, side), device=device).to(torch.int8) for _ in range(2)
    )
    one = torch.ones((), device=device)
    source = noise(torch.bfloat16, copied // 2)
    target = torch.empty_like(source)

    def fp8(fast: bool) -> Callable[[], object]:
        return lambda: torch._scaled_mm(
            a8, b8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=fast
        )

    return {
        BF16: lambda: a @ b.t(),
        FP8: fp8(True),
        EXACT_FP8: fp8(False),
        INT8: lambda: torch._int_mm(a_int, b_int.t()),
        COPY: lambda: target.copy_(source),
    }


def work(name: str, side: int = SIDE, copied: int = COPIED) -> float:
    """Operations of a product, or bytes of the copy."""
    return 2.0 * copied if name == COPY else 2.0 * side**3


def gpu_peaks(
    device: torch.device | None = None, side: int = SIDE, copied: int = COPIED
) -> tuple[dict[str, float], float] | None:
    """Operations per second by number format, and bytes per second of a copy.

    Args:
        device: None is the current GPU.
        side: of the matrices.
        copied: bytes of the copy.

    Returns:
        None without a GPU, or where bf16 products or copies fail.
    """
    if device is None:
        if not torch.cuda.is_available():
            return None
        device = torch.device("cuda", torch.cuda.current_device())
    calls = {}
    for name, call in peak_calls(device, side, copied).items():
        try:
            call()
        except (RuntimeError, NotImplementedError):  # the device lacks the number format
            continue
        calls[name] = call
    seconds = medians(interleaved(list(calls.values()), device))
    rates = {n: work(n, side, copied) / s for n, s in zip(calls, seconds, strict=True)}
    flops = {number: rates[name] for name, number in _NUMBER_FORMATS.items() if name in rates}
    if "high" not in flops or COPY not in rates:
        return None
    return flops, rates[COPY]
