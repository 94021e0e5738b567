"""Table of what skipping costs, measured along trajectories.

A prediction of :class:`wanx.runtime.sampling.cache.base.ScheduledCache` is a weighted sum of
predictions of the noise, so its error follows from their inner products, for every schedule,
guidance scale and list of noise levels; those between the measured ones are interpolated. What an
error does to the result was measured too: some steps were skipped alone, and the run went on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from wanx.runtime.sampling.cache.base import Velocities, log_snr
from wanx.runtime.sampling.sampler import Float32, Float64


@dataclass(frozen=True, kw_only=True, eq=False)
class StepTable:
    """Inner products, summed over samples.

    Attributes:
        sigmas: noise levels ``[N]`` of the measured steps, falling.
        noise: of the predictions of the noise, float64 ``[3, N, N]``: conditional with
            conditional, conditional with unconditional, unconditional with unconditional.
        velocity: likewise of the velocities of one step, float64 ``[3, N]``.
        growth: relative error of the result for one of the velocity, over the step's change of
            the noise level, float64 ``[N]``.
        samples: trajectories that were measured.
    """

    sigmas: Float64
    noise: Float64
    velocity: Float64
    growth: Float64
    samples: int

    def costs(self, sigmas: Sequence[float], scales: Sequence[float]) -> SkipCosts:
        """Costs of skipping steps of a run.

        Args:
            sigmas: noise levels of the run's steps.
            scales: their guidance scales.
        """
        levels = [log_snr(float(sigma)) for sigma in sigmas]
        known = np.array([log_snr(float(sigma)) for sigma in self.sigmas])
        onto = np.stack([np.interp(levels, known, row) for row in np.eye(len(known))], axis=1)
        growth = np.exp(np.interp(levels, known, np.log(self.growth)))
        change = -np.diff(np.append(sigmas, 0.0))
        return SkipCosts(
            np.array(sigmas, np.float64),
            growth * change,
            np.stack([_by_branch(scale) for scale in scales]),
            onto @ self.noise @ onto.T,
            self.velocity @ onto.T,
        )


class SkipCosts:
    """Predictions of the steps of a run, and their errors."""

    def __init__(
        self,
        sigmas: Float64,
        sensitivity: Float64,
        guided: Float64,
        noise: Float64,
        velocity: Float64,
    ) -> None:
        """Keep the inner products at the run's own noise levels.

        Args:
            sigmas: noise levels ``[N]``.
            sensitivity: relative error of the result for one of the velocity ``[N]``.
            guided: weights of the three products, by step ``[N, 3]``.
            noise: products ``[3, N, N]``.
            velocity: products ``[3, N]``.
        """
        self._sensitivity = sensitivity
        self._noise = np.einsum("sk,kij->sij", guided, noise)
        self._norms = np.einsum("sk,ks->s", guided, velocity) * (1 - sigmas) ** 2

    def slope(self, step: int, last: int, before: int | None) -> float:
        """Weight w of ``ε_last + w·(ε_last - ε_before)`` with the least error at a step."""
        if before is None:
            return 0.0
        products = self._noise[step]
        change = products[last] - products[before]
        length = change[last] - change[before]
        return float((change[step] - change[last]) / length) if length > 0 else 0.0

    def slopes(self, computed: Sequence[int]) -> dict[int, float]:
        """Weights of the predictions of the steps that are skipped.

        Args:
            computed: the other steps, ascending, the first among them.
        """
        return {
            step: self.slope(step, last, before)
            for step, last, before in skipped_steps(computed, len(self._norms))
        }

    def cost(self, step: int, last: int, before: int | None) -> float:
        """Squared relative error of the result where a step is skipped; arguments of `error`."""
        return float(self._sensitivity[step] ** 2) * self.error(step, last, before)

    def error(self, step: int, last: int, before: int | None) -> float:
        """Squared relative error of the guided velocity where a step is skipped.

        Args:
            step: that is skipped, from 0.
            last: computed before it.
            before: computed before that, if any.
        """
        slope = self.slope(step, last, before)
        at = [step, last, last if before is None else before]
        weights = np.array([-1.0, 1.0 + slope, -slope])
        error = float(weights @ self._noise[step][np.ix_(at, at)] @ weights)
        return max(error, 0.0) / self._norms[step] if self._norms[step] > 0 else 0.0


def skipped_steps(computed: Sequence[int], count: int) -> Iterator[tuple[int, int, int | None]]:
    """Steps of ``count`` that are skipped, each with the last two computed before it."""
    for step in range(count):
        if step not in computed:
            *others, last = [known for known in computed if known < step]
            yield step, last, others[-1] if others else None


def _by_branch(scale: float) -> Float64:
    """Weights of the three products in that of ``γ·c + (1 - γ)·u`` with itself."""
    return np.array([scale**2, 2 * scale * (1 - scale), (1 - scale) ** 2])


class TableRecorder:
    """Inner products of a trajectory, step by step; those of several add up."""

    def __init__(self, sigmas: Sequence[float]) -> None:
        """Begin a table for trajectories of the same noise levels."""
        self._sigmas = np.array(sigmas, np.float64)
        count = len(self._sigmas)
        self._noise = np.zeros((3, count, count))
        self._velocity = np.zeros((3, count))
        self._samples = 0

    def trajectory(self) -> Trajectory:
        """Begin a trajectory."""
        self._samples += 1
        return Trajectory(self._sigmas, self._noise, self._velocity)

    def table(self, growth: Float64 | None = None) -> StepTable:
        """Sums so far, with the growth of errors; None takes it for 1."""
        # The cross products are recorded for both orders of the steps.
        noise = self._noise.copy()
        noise[1] = (noise[1] + noise[1].T) / 2
        return StepTable(
            sigmas=self._sigmas, noise=noise, velocity=self._velocity.copy(),
            growth=np.ones(len(self._sigmas)) if growth is None else growth,
            samples=self._samples,
        )  # fmt: skip


class Trajectory:
    """One trajectory: keeps its predictions, to multiply them with later ones."""

    def __init__(self, sigmas: Float64, noise: Float64, velocity: Float64) -> None:
        self._sigmas, self._noise, self._velocity = sigmas, noise, velocity
        self._seen: list[tuple[Float32, Float32]] = []

    def note(self, step: int, latent: Float32, velocities: Velocities) -> None:
        """Add a step; a branch that is missing is that of the other."""
        share = np.float32(1 - self._sigmas[step])
        either = next(iter(velocities.values()))
        c = velocities.get("conditional", either).ravel()
        u = velocities.get("unconditional", either).ravel()
        self._velocity[:, step] += [_dot(c, c), _dot(c, u), _dot(u, u)]
        noise = latent.ravel() + share * c, latent.ravel() + share * u
        self._seen.append(noise)
        for other, (c_before, u_before) in enumerate(self._seen):
            cc, uu = _dot(c_before, noise[0]), _dot(u_before, noise[1])
            self._noise[:, other, step] += [cc, _dot(c_before, noise[1]), uu]
            if other != step:
                self._noise[:, step, other] += [cc, _dot(noise[0], u_before), uu]


def _dot(a: Float32, b: Float32) -> float:
    """In float64, as neighbours differ little."""
    return float(np.dot(a.astype(np.float64), b.astype(np.float64)))
