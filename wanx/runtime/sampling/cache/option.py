"""The option ``--cache``: ``off``, ``easy``, ``easy:0.05``, or a speedup such as ``2x``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from wanx.errors import UsageError
from wanx.runtime.sampling.cache.easy import DEFAULT_THRESHOLD


@dataclass(frozen=True, kw_only=True)
class CacheOption:
    """A step cache that was asked for.

    Attributes:
        speedup: how many times as few forwards the network runs; None for EasyCache.
        threshold: of EasyCache.
    """

    speedup: float | None = None
    threshold: float = DEFAULT_THRESHOLD

    def __str__(self) -> str:
        """The option's canonical text."""
        return f"easy:{self.threshold:g}" if self.speedup is None else f"{self.speedup:g}x"


def parse_cache(cache: str | None, speedup: float | None = None) -> CacheOption | None:
    """Read the option; None where there is no cache.

    Args:
        cache: text of ``--cache``.
        speedup: of ``--speedup``, which says the same as a cache with an ``x``.

    Raises:
        UsageError: it is neither, or both are given.
    """
    if cache is not None and speedup is not None:
        raise UsageError("--cache and --speedup do not go together; give one of them")
    if speedup is not None:
        return _speedup(speedup)
    if cache is None or cache == "off":
        return None
    if match := re.fullmatch(r"easy(:(\d*\.?\d+))?", cache):
        threshold = float(match[2] or DEFAULT_THRESHOLD)
        if not 0 < threshold < 1e3:
            raise UsageError(f"cache is {cache}; give EasyCache a threshold such as easy:0.05")
        return CacheOption(threshold=threshold)
    if match := re.fullmatch(r"(\d*\.?\d+)x", cache):
        return _speedup(float(match[1]))
    raise UsageError(f"cache is {cache!r:.80}; give off, easy, easy:0.05, or a speedup such as 2x")


def _speedup(speedup: float) -> CacheOption | None:
    if not (math.isfinite(speedup) and speedup >= 1):
        raise UsageError(f"speedup is {speedup:g}; give 1 or more, such as 2")
    return CacheOption(speedup=speedup) if speedup > 1 else None
