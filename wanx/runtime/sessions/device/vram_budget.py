"""How much of a GPU's memory a run may take, as the user says it."""

from __future__ import annotations

from wanx.errors import UsageError
from wanx.memory_size import parse_memory

_LEAST = 1 << 20  # a plain number below was hardly meant in bytes


def parse_vram_budget(text: str) -> int:
    """Bytes of ``12G``, ``512M`` (powers of two) or ``12884901888``.

    Raises:
        UsageError: it is no such size.
    """
    size = parse_memory(text)
    if size < _LEAST:
        raise UsageError(
            f"--vram-budget {text:.40} is not a size; give one such as 12G, 512M or 12884901888"
        )
    return size


def require_streaming(target: str) -> None:
    """Refuse a budget for a bundle that cannot keep to one.

    Args:
        target: of the bundle.

    Raises:
        UsageError: says why.
    """
    if target == "aoti":
        raise UsageError(
            "--vram-budget is for engines of TensorRT; PyTorch manages the memory of this "
            "bundle, whose target is aoti: leave it out"
        )
    if target not in ("rtx", "tensorrt"):
        raise UsageError(
            "--vram-budget is for GPUs, and this bundle runs on the processor: leave it out"
        )
