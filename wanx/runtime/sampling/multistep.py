"""Multistep solvers: UniPC (bh2, order 2) and DPM-Solver++ 2M (midpoint).

A latent at noise level σ is ``x = (1 - σ)·clean + σ·noise``; the model predicts the velocity
``noise - clean``, so its clean prediction is ``m = x - σ·velocity``. Both solvers integrate
``dx/dσ = velocity`` in ``λ = ln((1 - σ)/σ)`` and take the same predictor; UniPC also corrects each
latent once the prediction at it is known, from the previous corrected latent, without asking the
model again. Every update is a weighted sum of a latent and of clean predictions whose weights
follow from the noise levels alone, so they are tabulated up front.

Sources: Zhao et al. 2023, "UniPC"; Lu et al. 2022, "DPM-Solver++"; the reference implementation of
Wan2.1 for the grids. The peers' pipelines start from a slightly different grid (recent diffusers:
``linspace(1, .001, N + 1)``): pass ``sigmas`` to follow them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from wanx.runtime.sampling.sampler import Float32, Float64, Sampler


@dataclass(frozen=True)
class LinearUpdate:
    """``x' = latent·x + Σ predictions[k]·m[k]``, with the newest clean prediction first."""

    latent: float
    predictions: tuple[float, ...]

    def __call__(self, latent: Float32, predictions: tuple[Float32, ...]) -> Float32:
        """Apply the update; weights are rounded to the arrays' precision."""
        result = self.latent * latent
        # A young run has fewer predictions than weights; the weights of the missing ones are 0.
        for weight, prediction in zip(self.predictions, predictions, strict=False):
            result += weight * prediction
        return result


class Multistep(Sampler):
    """Base of both solvers: keeps the clean predictions of the two steps before."""

    _history: tuple[Float32, ...] = ()

    @cached_property
    def _predictors(self) -> list[LinearUpdate]:
        return [_predictor(self.sigmas, i) for i in range(len(self.timesteps))]

    @staticmethod
    def timestep(sigma: float) -> float:
        """``trunc(1000·σ)``, as the reference implementation has it."""
        return int(1000 * sigma)

    def _advance(self, position: int, velocity: Float32, latent: Float32) -> Float32:
        prediction = latent - float(self.sigmas[position]) * velocity
        history = (prediction, *self._history)
        latent = self._refine(position, latent, history)
        self._history = history[:2]
        return self._predictors[position](latent, history)

    def _refine(self, position: int, latent: Float32, history: tuple[Float32, ...]) -> Float32:
        """Improve the latent at ``position`` now that the prediction at it is known."""
        return latent


class DPMPlusPlus(Multistep):
    """DPM-Solver++ 2M, midpoint, from level 1; the first and the last step are of order 1."""


class UniPC(Multistep):
    """UniPC with B(h) = exp(-h) - 1; the first and the last predictor step are of order 1."""

    _corrected: Float32 | None = None

    @cached_property
    def _correctors(self) -> list[LinearUpdate]:
        return [_corrector(self.sigmas, i) for i in range(1, len(self.timesteps))]

    @staticmethod
    def grid(steps: int) -> Float64:
        """Noise levels from 0.999, rounded as the reference does."""
        return np.linspace(float(np.float32(0.999)), 0, steps + 1)[:-1]

    def _refine(self, position: int, latent: Float32, history: tuple[Float32, ...]) -> Float32:
        if self._corrected is not None:
            latent = self._correctors[position - 1](self._corrected, history)
        self._corrected = latent
        return latent


def _log_snr(sigma: float) -> float:
    """λ = ln(1 - σ) - ln σ, infinite at the two ends."""
    if sigma in (0, 1):
        return math.inf if sigma == 0 else -math.inf
    return math.log1p(-sigma) - math.log(sigma)


def _order(position: int, steps: int) -> int:
    return min(2, position + 1, steps - position)


def _predictor(sigmas: Float64, i: int) -> LinearUpdate:
    """Weights of x_i, m_i, m_{i-1} that give x_{i+1}."""
    now, after = float(sigmas[i]), float(sigmas[i + 1])
    h = _log_snr(after) - _log_snr(now)
    gain = -(1 - after) * math.expm1(-h)
    slope = 0.0
    if _order(i, len(sigmas) - 1) == 2:
        slope = 0.5 * h / (_log_snr(now) - _log_snr(float(sigmas[i - 1])))
    return LinearUpdate(after / now, (gain * (1 + slope), -gain * slope))


def _corrector(sigmas: Float64, i: int) -> LinearUpdate:
    """Weights of the corrected x_{i-1} and of m_i, m_{i-1}, m_{i-2} that give the corrected x_i."""
    before, now = float(sigmas[i - 1]), float(sigmas[i])
    h = _log_snr(now) - _log_snr(before)
    base = math.expm1(-h)
    gain = -(1 - now) * base
    older, newer = 0.0, 0.5
    if _order(i - 1, len(sigmas) - 1) == 2:
        ratio = (_log_snr(float(sigmas[i - 2])) - _log_snr(before)) / h
        phi1 = -base / h - 1
        phi2 = -phi1 / h - 0.5
        # The solution of [[1, 1], [ratio, 1]] · weights = [phi1, 2·phi2] / base.
        weight = (2 * phi2 - phi1) / base / (ratio - 1)
        older, newer = weight / ratio, phi1 / base - weight
    return LinearUpdate(now / before, (gain * newer, gain * (1 - older - newer), gain * older))
