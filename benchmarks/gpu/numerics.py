"""Distances between tensors that are too large to be copied to float64 whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

_CHUNK = 1 << 24
_TINY = 1e-300
_WORST: dict[str, Callable[[list[float]], float]] = {
    "cosine": min,
    "relative_rms": max,
    "max_error": max,
}


def cosine(found: Tensor, right: Tensor) -> float:
    """Cosine of the angle between two tensors of one shape; nan where either is not finite."""
    return _differences(found, right)["cosine"]


def differences(found: Iterable[Tensor], right: Iterable[Tensor]) -> dict[str, float]:
    """How far results are from the right ones; the worst of all pairs, nan where that is nan.

    Returns:
        ``cosine``; ``relative_rms``, ‖found - right‖ / ‖right‖; and ``max_error``, the largest
        difference over the largest magnitude of what is right.
    """
    pairs = [_differences(f, r) for f, r in zip(found, right, strict=True)]
    return {
        name: math.nan if any(math.isnan(v) for v in values) else worst(values)
        for name, worst in _WORST.items()
        for values in [[pair[name] for pair in pairs]]
    }


def _differences(found: Tensor, right: Tensor) -> dict[str, float]:
    dot = power = reference = off = largest = error = 0.0
    for f, r in _chunks(found, right):
        dot += float((f * r).sum(dtype=torch.float64))
        power += float(f.square().sum(dtype=torch.float64))
        reference += float(r.square().sum(dtype=torch.float64))
        difference = (f - r).abs()
        off += float(difference.square().sum(dtype=torch.float64))
        largest = max(largest, float(r.abs().max()))
        error = max(error, float(difference.max()))
    if not math.isfinite(power + reference):
        return dict.fromkeys(_WORST, math.nan)
    return {
        "cosine": dot / math.sqrt(max(power * reference, _TINY)),
        "relative_rms": math.sqrt(off / max(reference, _TINY)),
        "max_error": error / max(largest, _TINY),
    }


def _chunks(found: Tensor, right: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    if found.shape != right.shape:
        raise ValueError(f"shapes differ: {list(found.shape)} and {list(right.shape)}")
    found, right = found.reshape(-1), right.reshape(-1)
    for start in range(0, len(found), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        yield found[chunk].float(), right[chunk].float()
