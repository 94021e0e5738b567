"""Solvers of one velocity a step, for models that were distilled to few steps."""

from __future__ import annotations

import math

import numpy as np

from wanx.errors import UsageError
from wanx.runtime.sampling.sampler import Float32, Float64, Sampler

_RCM_ANGLES = (1.5, 1.4, 1.0)
# Of the first step, by what the model starts from: text alone, or an image too.
RCM_SIGMA_MAX, RCM_SIGMA_MAX_IMAGE = 80.0, 200.0


class Euler(Sampler):
    """``x' = x + (σ' - σ)·velocity``."""

    def _advance(self, position: int, velocity: Float32, latent: Float32) -> Float32:
        step = self.sigmas[position + 1] - self.sigmas[position]
        return latent + np.float32(step) * velocity


class Lcm(Sampler):
    """``x' = (1 - σ')·clean + σ'·noise`` with fresh noise, where clean is ``x - σ·velocity``.

    Multistep consistency sampling (Luo et al. 2023, "Latent Consistency Models").
    """

    stochastic = True

    def _advance(self, position: int, velocity: Float32, latent: Float32) -> Float32:
        now, after = self.sigmas[position : position + 2]
        clean = latent - np.float32(now) * velocity
        if after == 0:
            return clean
        noise = self._noise(latent.shape)
        return np.float32(1 - after) * clean + np.float32(after) * noise


class RcmOde(Euler):
    """Euler on the noise levels of rCM, from ``σ₀·noise``.

    Source: Zheng et al. 2025, "rCM", and its implementation: angles of the trigonometric schedule
    ``arctan σ_max, 1.5, 1.4, 1.0``, each a level ``σ = sin/(sin + cos)``.
    """

    @property
    def noise_scale(self) -> float:
        """The first noise level."""
        return float(self.sigmas[0])

    @staticmethod
    def levels(steps: int, shift: float, sigma_max: float = RCM_SIGMA_MAX) -> Float64:
        """Noise levels of at most four steps; there is no shift."""
        if steps > 1 + len(_RCM_ANGLES):
            raise UsageError(f"steps is {steps}; solver rcm takes 1 to {1 + len(_RCM_ANGLES)}")
        angles = np.array([math.atan(sigma_max), *_RCM_ANGLES][:steps])
        return np.asarray(np.sin(angles) / (np.sin(angles) + np.cos(angles)), np.float64)


class Rcm(RcmOde, Lcm):
    """Fresh noise at each step on the same levels, from ``σ₀·noise``."""

    _advance = Lcm._advance
