"""Distances of a call's results from their references, the worst of them all."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from wanx.kernels.tensor_metrics import Difference


def cosine(candidate: Tensor, reference: Tensor) -> float:
    """Cosine of the angle between two tensors of one shape; nan where either is not finite."""
    return Difference.of(candidate, reference).cosine


def differences(candidates: Iterable[Tensor], references: Iterable[Tensor]) -> dict[str, float]:
    """The worst distance of all pairs, nan where any is.

    Returns:
        ``cosine``, ``relative_rms`` and ``max_error`` of
        :class:`wanx.kernels.tensor_metrics.Difference`.
    """
    pairs = [Difference.of(c, r) for c, r in zip(candidates, references, strict=True)]
    if not all(pair.finite for pair in pairs):
        return dict.fromkeys(("cosine", "relative_rms", "max_error"), math.nan)
    return {
        "cosine": min(pair.cosine for pair in pairs),
        "relative_rms": max(pair.relative_rms for pair in pairs),
        "max_error": max(pair.max_error for pair in pairs),
    }
