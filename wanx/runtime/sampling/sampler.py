"""Base of the solvers of a denoising run.

A latent at noise level σ is ``x = (1 - σ)·clean + σ·noise``; the model predicts the velocity
``noise - clean``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Draw = Callable[[Sequence[int]], Float32]


class Sampler(ABC):
    """One denoising run: call `step` once per timestep, in order; then build a new sampler.

    Attributes:
        sigmas: noise levels, float64 ``[steps + 1]``, strictly decreasing from at most 1 to 0.
        timesteps: what the model is fed at each step; values may repeat.
        stochastic: whether steps draw noise.
    """

    stochastic = False

    def __init__(
        self,
        sigmas: Float64,
        timesteps: tuple[float, ...] | None = None,
        draw: Draw | None = None,
    ) -> None:
        """Prepare the steps.

        Args:
            sigmas: as of the attribute.
            timesteps: where they are not the solver's own function of the noise levels.
            draw: gives standard normal noise, float32, of a shape.
        """
        self.sigmas = sigmas
        own = tuple(self.timestep(float(sigma)) for sigma in sigmas[:-1])
        self.timesteps = own if timesteps is None else timesteps
        self._position = 0
        self._draw = draw

    @property
    def noise_scale(self) -> float:
        """Factor of the run's first noise."""
        return 1.0

    @staticmethod
    def grid(steps: int) -> Float64:
        """Noise levels before the shift, float64 ``[steps]``, decreasing."""
        return np.linspace(1, 0, steps + 1)[:-1]

    @classmethod
    def levels(cls, steps: int, shift: float) -> Float64:
        """Noise levels after the shift s, ``s·σ / (1 + (s - 1)·σ)``, float64 ``[steps]``."""
        return warp(cls.grid(steps), shift)

    @staticmethod
    def timestep(sigma: float) -> float:
        """What the model is fed at a noise level: 1000·σ."""
        return 1000 * sigma

    def step(self, velocity: Float32, latent: Float32) -> Float32:
        """Advance by one step.

        Args:
            velocity: Output of the model for ``latent`` at this step's timestep, float32, any
                shape.
            latent: The noise for the first step, then what the last call returned; same shape.

        Returns:
            The latent at the next noise level, float32; the last one is the clean latent.

        Raises:
            ValueError: Shapes differ, or every step has been taken.
        """
        if velocity.shape != latent.shape:
            raise ValueError(f"velocity {velocity.shape} and latent {latent.shape} differ in shape")
        position = self._position
        if position == len(self.timesteps):
            raise ValueError(f"all {position} steps are done; make a new sampler for another run")
        after = self._advance(position, velocity, latent)
        self._position += 1
        return after

    @abstractmethod
    def _advance(self, position: int, velocity: Float32, latent: Float32) -> Float32:
        """The latent after the step at ``position``."""

    def _noise(self, shape: Sequence[int]) -> Float32:
        if self._draw is None:
            raise ValueError(f"{type(self).__name__} draws noise; pass `draw`")
        return self._draw(shape)


def warp(levels: Float64, shift: float) -> Float64:
    """Noise levels leaned to high noise by a shift s: ``s·σ / (1 + (s - 1)·σ)``, at most 1."""
    # Rounding may lift the level 1 above itself.
    return np.minimum(shift * levels / (1 + (shift - 1) * levels), 1.0)
