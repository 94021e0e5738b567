"""Bounds of numbers that buy resources, so that a slip of the finger stalls no machine."""

from __future__ import annotations

import os
from numbers import Integral

from wanx.errors import UsageError

MAX_THREADS = max(64, os.cpu_count() or 1)
MAX_VIDEOS = 10_000  # of one prompt
MAX_PROMPTS = 100_000  # lines of a file
MAX_REPEATS = 1000  # of a benchmark
MAX_WORKSPACE = 1 << 40  # bytes
MAX_LATENT_VALUES = 1 << 27  # of float32; 720P, 81 frames, VACE is 29 million


def require_between(name: str, value: int | None, least: int, most: int) -> None:
    """Refuse a number that is out of bounds; None is within any.

    Args:
        name: for the message, such as ``threads``.
        value: the number.
        least: the smallest allowed.
        most: the largest allowed.

    Raises:
        UsageError: says the number and the bounds.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if value is not None and not (whole and least <= value <= most):
        raise UsageError(f"{name} is {value!r:.80}; choose {least} to {most}")
