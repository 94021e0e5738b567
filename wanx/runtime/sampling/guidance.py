"""Classifier-free guidance (Ho and Salimans 2022): push the prediction along the prompt."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wanx.errors import UsageError

Branch = Literal["conditional", "unconditional"]
Float32 = NDArray[np.float32]


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
def guide(conditional: Float32, unconditional: Float32, scale: float) -> Float32:
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


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Guidance of a run, step by step.

    Attributes:
        scales: of each step.
        zero_steps: first steps that leave the latent as it is, and need no prediction: zero-init
            of CFG-Zero* (Fan et al. 2025).
        zero_star: scale the unconditional prediction by its projection ``⟨c, u⟩ / ‖u‖²``, as
            CFG-Zero* does.
        projected: leave out of ``c - u`` what is parallel to c (Sadat et al. 2024, "APG", η = 0).
        rescale: share φ of the guided prediction that is brought to the standard deviation of c
            (Lin et al. 2023, section 3.4).
    """

    scales: tuple[float, ...]
    zero_steps: int = 0
    zero_star: bool = False
    projected: bool = False
    rescale: float = 0.0

    @property
    def branches(self) -> tuple[Branch, ...]:
        """Branches that any of the steps needs."""
        needed = {branch for step in range(len(self.scales)) for branch in self.branches_at(step)}
        return tuple(branch for branch in _BRANCHES if branch in needed)

    @cached_property
    def required_steps(self) -> frozenset[int]:
        """Steps whose predictions cannot come from those before.

        They are those of zero, and those that need a branch which the step before did without.
        """
        known: set[Branch] = set()
        required = set()
        for step in range(len(self.scales)):
            needed = set(self.branches_at(step))
            if not needed or not needed <= known:
                required.add(step)
            known = needed
        return frozenset(required)

    def branches_at(self, step: int) -> tuple[Branch, ...]:
        """Branches that a step needs, from 0."""
        return () if step < self.zero_steps else branches(self.scales[step])

    @np.errstate(over="ignore", invalid="ignore")
    def combine(self, step: int, velocities: Mapping[Branch, Float32]) -> Float32:
        """Guided velocity of a step, from 0.

        Args:
            step: that is coming; not one of the first ``zero_steps``, whose velocity is 0.
            velocities: of the branches that it needs, float32, of one shape.

        Raises:
            ValueError: the shapes differ.
        """
        if len(velocities) == 1:
            return next(iter(velocities.values()))
        conditional, unconditional = velocities["conditional"], velocities["unconditional"]
        scale = self.scales[step]
        if self.projected:
            guided = conditional + np.float32(scale - 1) * _orthogonal(
                conditional - unconditional, conditional
            )
        else:
            if self.zero_star:
                unconditional = unconditional * _projection(conditional, unconditional)
            guided = guide(conditional, unconditional, scale)
        if self.rescale:
            factor = _deviation(conditional) / _deviation(guided)
            guided = guided * np.float32(self.rescale * factor + 1 - self.rescale)
        return guided


_BRANCHES: tuple[Branch, ...] = ("conditional", "unconditional")


def _deviation(values: Float32) -> float:
    return float(np.std(values, dtype=np.float64, ddof=1))


def _projection(conditional: Float32, unconditional: Float32) -> np.float32:
    """``⟨c, u⟩ / ‖u‖²``."""
    c, u = conditional.astype(np.float64), unconditional.astype(np.float64)
    return np.float32(np.vdot(c, u) / (np.vdot(u, u) + 1e-8))


def _orthogonal(difference: Float32, direction: Float32) -> Float32:
    """A difference without its part along a direction."""
    d, c = difference.astype(np.float64), direction.astype(np.float64)
    share = float(np.vdot(d, c)) / max(float(np.vdot(c, c)), 1e-24)
    return (d - share * c).astype(np.float32)


def scales_of(guide_scale: float | str, steps: int) -> tuple[float, ...]:
    """Guidance scale of each step.

    Args:
        guide_scale: a number, or intervals of the run such as ``5@0-40%,1@40-100%``; outside of
            them it is 1. A step belongs to where it begins.
        steps: of the run.

    Raises:
        UsageError: it is neither, or intervals overlap.
    """
    if not isinstance(guide_scale, str):
        return (guide_scale,) * steps
    intervals = [_interval(part, guide_scale) for part in guide_scale.split(",")]
    ordered = sorted(intervals, key=lambda interval: interval[1])
    for (_, _, end), (_, start, _) in itertools.pairwise(ordered):
        if start < end:
            raise UsageError(
                f"the intervals of guide scale {guide_scale} overlap at {100 * start:g}%; end one "
                "where the next begins"
            )
    scales = []
    for step in range(steps):
        share = step / steps
        scales.append(next((scale for scale, start, end in intervals if start <= share < end), 1.0))
    return tuple(scales)


def parse_guide_scale(text: str) -> float | str:
    """Read a guidance scale: a number, or intervals as of :func:`scales_of`.

    Raises:
        UsageError: it is neither.
    """
    text = "".join(text.split())
    if "@" not in text:
        try:
            return float(text)
        except ValueError:
            raise _no_scale(text) from None
    scales_of(text, 1)
    return text


def _interval(part: str, whole: str) -> tuple[float, float, float]:
    """Scale, begin and end, as shares of the run, of ``5@0-40%``."""
    scale, _, share = part.partition("@")
    begin, dash, end = share.removesuffix("%").partition("-")
    try:
        values = float(scale), float(begin) / 100, float(end) / 100
    except ValueError:
        raise _no_scale(whole) from None
    if not (dash and share.endswith("%") and 0 <= values[1] < values[2] <= 1):
        raise _no_scale(whole)
    _require_finite(values[0])
    return values


def _no_scale(text: str) -> UsageError:
    return UsageError(
        f"guide scale is {text!r:.80}; give a number such as 5, or shares of the run such as "
        "5@0-40%,1@40-100%"
    )


def _require_finite(scale: float) -> None:
    if not math.isfinite(scale):
        raise UsageError(f"guide scale is {scale}; it must be a finite number, such as 5")
