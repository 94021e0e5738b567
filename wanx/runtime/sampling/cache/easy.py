"""EasyCache (Zhou et al. 2025): skips while the output is predicted to change little."""

from __future__ import annotations

import numpy as np

from wanx.runtime.sampling.cache.base import StepCache, Velocities
from wanx.runtime.sampling.guidance import Branch
from wanx.runtime.sampling.sampler import Float32

DEFAULT_THRESHOLD = 0.05
FIRST_STEPS = 7


class EasyCache(StepCache):
    """Decides while the run goes on, by the conditional branch where there is one.

    At computed steps ``k = mean|v - v'| / mean|x - x'|`` with those of the computed step before.
    At the others ``k·mean|Δx| / mean|v'|`` accumulates, where Δx is the change of the latent since
    the step before; below the threshold the velocity is ``x + (v' - x')``. The first seven steps
    and the last are computed.
    """

    def __init__(self, steps: int, threshold: float) -> None:
        """Prepare a run.

        Args:
            steps: of the run.
            threshold: of the accumulated relative change.
        """
        self._steps, self._threshold = steps, threshold
        self._rate: float | None = None
        self._error = 0.0
        self._previous: Float32 | None = None  # latent of the step before
        self._latent: Float32 | None = None  # of the last computed step
        self._velocities: dict[Branch, Float32] = {}

    def skips(self, step: int, latent: Float32) -> bool:
        """True while the change that has accumulated is below the threshold."""
        previous, self._previous = self._previous, latent
        if not FIRST_STEPS <= step < self._steps - 1 or self._rate is None:
            return False
        assert previous is not None
        change = _mean(latent - previous) / _mean(self._decisive(self._velocities))
        self._error += self._rate * change
        return self._error < self._threshold

    def note(self, step: int, latent: Float32, velocities: Velocities) -> None:
        """Measure how much the output changes with the latent."""
        if self._latent is not None:
            change = self._decisive(velocities) - self._decisive(self._velocities)
            self._rate = _mean(change) / _mean(latent - self._latent)
        self._previous = self._latent = latent
        self._velocities, self._error = dict(velocities), 0.0

    def predict(self, step: int, latent: Float32, branch: Branch) -> Float32:
        """The latent and what the network made of the last one."""
        assert self._latent is not None
        return latent + (self._velocities[branch] - self._latent)

    @staticmethod
    def _decisive(velocities: Velocities) -> Float32:
        return velocities.get("conditional", next(iter(velocities.values())))


def _mean(values: Float32) -> float:
    return float(np.abs(values).mean(dtype=np.float64))
