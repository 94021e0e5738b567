"""Interface of step caches, and the one that follows a schedule."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from wanx.runtime.sampling.guidance import Branch
from wanx.runtime.sampling.sampler import Float32

Velocities = Mapping[Branch, Float32]
_NOISIEST = -8.0


class StepCache(ABC):
    """State of one run: asked at every step in order, told what the network computed."""

    @abstractmethod
    def skips(self, step: int, latent: Float32) -> bool:
        """Decision on a step, from 0: True predicts its velocities. It is asked once a step."""

    @abstractmethod
    def note(self, step: int, latent: Float32, velocities: Velocities) -> None:
        """Remember what the network computed at a step, float32, of the shape of the latent."""

    @abstractmethod
    def predict(self, step: int, latent: Float32, branch: Branch) -> Float32:
        """Velocity of a step that is skipped."""


class ScheduledCache(StepCache):
    """Steps that are known before the run; velocities are extrapolated.

    What is extrapolated is the noise that the model predicts, ``ε = x + (1 - σ)·velocity``, from
    the last two computed steps: ``ε_last + w·(ε_last - ε_first)`` (docs/numerics.md).
    """

    def __init__(
        self,
        sigmas: Sequence[float],
        computed: Collection[int],
        slopes: Mapping[int, float] | None = None,
    ) -> None:
        """Prepare a run.

        Args:
            sigmas: noise level of each step.
            computed: steps, from 0, at which the network runs.
            slopes: w of each step that is skipped; None is linear in ``λ = ln((1 - σ)/σ)``.
        """
        self._slopes = slopes
        self._sigmas = [float(sigma) for sigma in sigmas]
        self._levels = [log_snr(sigma) for sigma in self._sigmas]
        self._computed = frozenset(computed)
        self._known: dict[Branch, list[tuple[int, Float32]]] = {}

    def skips(self, step: int, latent: Float32) -> bool:
        """True for the steps that are not among the computed ones."""
        return step not in self._computed

    def note(self, step: int, latent: Float32, velocities: Velocities) -> None:
        """Keep the last two predictions of the noise; none of a branch that was left out."""
        share = np.float32(1 - self._sigmas[step])
        self._known = {
            branch: [*self._known.get(branch, [])[-1:], (step, latent + share * velocity)]
            for branch, velocity in velocities.items()
        }

    def predict(self, step: int, latent: Float32, branch: Branch) -> Float32:
        """Extrapolate the noise, and take the velocity from it."""
        *before, (last, noise) = self._known[branch]
        if before:
            ((first, older),) = before
            if self._slopes is None:
                now, newer, older_level = (self._levels[i] for i in (step, last, first))
                slope = (now - newer) / (newer - older_level)
            else:
                slope = self._slopes[step]
            noise = noise + np.float32(slope) * (noise - older)
        return (noise - latent) / np.float32(1 - self._sigmas[step])


def log_snr(sigma: float) -> float:
    """``λ = ln((1 - σ)/σ)``, at least that of what counts as pure noise."""
    return _NOISIEST if sigma == 1 else max(math.log1p(-sigma) - math.log(sigma), _NOISIEST)
