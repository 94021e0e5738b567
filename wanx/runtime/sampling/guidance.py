"""Classifier-free guidance (Ho and Salimans 2022): push the prediction along the prompt."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wanx.errors import UsageError

Branch = Literal["conditional", "unconditional"]


def branches(scale: float) -> tuple[Branch, ...]:
    """Name the predictions that a guidance scale γ needs.

    Returns:
        Only the unconditional branch for γ = 0, only the conditional one for γ = 1, both otherwise.
        Where one is enough, it is the guided prediction.

    Raises:
        UsageError: γ is not finite.
    """
    _require_finite(scale)
    if scale == 0:
        return ("unconditional",)
    if scale == 1:
        return ("conditional",)
    return ("conditional", "unconditional")


@np.errstate(over="ignore", invalid="ignore")  # the step refuses what is not finite
def guide(
    conditional: NDArray[np.float32], unconditional: NDArray[np.float32], scale: float
) -> NDArray[np.float32]:
    """Combine the two predictions as ``u + γ·(c - u)``.

    Args:
        conditional: Velocity c for the prompt, float32, any shape.
        unconditional: Velocity u for the negative prompt, float32, same shape.
        scale: Guidance scale γ; above 1 it strengthens the prompt.

    Returns:
        The guided velocity, float32, same shape.

    Raises:
        UsageError: γ is not finite.
        ValueError: The shapes differ.
    """
    if conditional.shape != unconditional.shape:
        raise ValueError(f"shapes differ: {conditional.shape} and {unconditional.shape}")
    _require_finite(scale)
    return unconditional + np.float32(scale) * (conditional - unconditional)


def _require_finite(scale: float) -> None:
    if not math.isfinite(scale):
        raise UsageError(f"guide scale is {scale}; it must be a finite number, such as 5")
