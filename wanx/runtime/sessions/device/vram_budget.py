"""Parsing of ``--vram-budget``."""

from __future__ import annotations

from wanx.errors import UsageError
from wanx.memory_size import parse_memory

_MIN_BYTES = 1 << 20  # a plain number below was hardly meant in bytes


def parse_vram_budget(text: str) -> int:
    """Parse ``12G``, ``512M`` (powers of two) or ``12884901888`` to bytes.

    Raises:
        UsageError: it is no such size.
    """
    size = parse_memory(text)
    if size < _MIN_BYTES:
        raise UsageError(
            f"--vram-budget {text:.40} is not a size; give one such as 12G, 512M or 12884901888"
        )
    return size
