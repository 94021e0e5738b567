"""State of one denoising run between two steps; the caller runs the network.

A run is taken to its end by :meth:`wanx.runtime.run_parts.RunParts.denoise`. Others keep many of
them in step over one network, or replay velocities that they stored.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from wanx.config.models import ModelConfig
from wanx.errors import WanxError
from wanx.runtime.inputs.conditioning import Conditioning, noise_shape
from wanx.runtime.options import ResolvedRun
from wanx.runtime.sampling.cache.base import StepCache
from wanx.runtime.sampling.guidance import Branch
from wanx.runtime.sampling.noise import TorchGenerator
from wanx.runtime.sessions.base import Array
from wanx.runtime.tokens import patchify, rope_tables, token_grid, unpatchify

Float32 = NDArray[np.float32]


class NonFiniteLatentError(WanxError):
    """The latent after a step holds NaN or infinity."""


class DenoisingRun:
    """The latent of one run between two steps: feeds of the network in, its velocities taken back.

    Each step is ``feeds``, the network, then ``advance``; or ``step`` alone, where the guided
    velocity is known.

    Attributes:
        constants: inputs of the denoiser's graph that are the same at every step and branch.
        steps: number of steps of the run.
        steps_done: number of those that are done.
        forwards: of the network so far, one for each branch of a step.
        predicted: steps so far, from 0, whose velocities a step cache predicted.
        latent: float32 ``[C, T, h, w]``, at the noise level of the coming step; references are its
            first frames.
    """

    def __init__(
        self,
        run: ResolvedRun,
        contexts: Mapping[Branch, Float32],
        conditioning: Conditioning,
        config: ModelConfig,
        *,
        latent: Float32 | None = None,
        cache: StepCache | None = None,
    ) -> None:
        """Start from seeded noise, or from ``latent``.

        Args:
            run: names seed, size, steps, shift, solver and guidance.
            contexts: text features ``[1, text_len, text_dim]`` of the branches that the guidance
                needs, at least.
            conditioning: inputs of the network beside noise and text.
            config: of the model.
            latent: float32 ``[C, T, h, w]`` to start from; None draws the noise of the seed.
            cache: that predicts the velocities of some steps.

        Raises:
            UsageError: there is no sampler for these options.
            ValueError: the initial latent has another shape than the noise.
        """
        shape = noise_shape(run, conditioning, config)
        if latent is not None and latent.shape != shape:
            raise ValueError(f"the initial latent has shape {latent.shape}, the run has {shape}")
        self._patch = config.dit.patch_size
        self._grid = token_grid(shape, self._patch)
        noise = TorchGenerator(run.seed)
        first = noise.randn(shape)
        self._sampler = run.sampler(noise.randn)
        self._guidance = run.guidance
        self._contexts = {branch: contexts[branch] for branch in self._guidance.branches}
        self._cache = cache
        self._predicts: tuple[int, bool] = -1, False  # step, and whether it is predicted
        self._conditioning = conditioning
        cos, sin = rope_tables(self._grid, config.dit.rope_dims)
        self.constants: dict[str, Array] = {
            "rope_cos": cos, "rope_sin": sin
        } | conditioning.constants  # fmt: skip
        self.steps = len(self._sampler.timesteps)
        self.steps_done = 0
        self.forwards = 0
        self.predicted: list[int] = []
        if latent is None:
            latent = first * np.float32(self._sampler.noise_scale)
        self.latent = latent

    @property
    def timestep(self) -> float:
        """The network's timestep at the coming step; IndexError once every step is done."""
        return float(self._sampler.timesteps[self.steps_done])

    @property
    def done(self) -> bool:
        """True once every step is done."""
        return self.steps_done == self.steps

    @property
    def result(self) -> Float32:
        """The latent without its references, float32 ``[C, T, h, w]``; clean once all is done."""
        return self.latent[:, self._conditioning.references :]

    def branches(self) -> tuple[Branch, ...]:
        """Branches that the network runs at the coming step; none where that is not needed.

        Raises:
            IndexError: every step is done.
        """
        if self.done:
            raise IndexError(f"all {self.steps} steps are done")
        return () if self._is_predicted() else self._guidance.branches_at(self.steps_done)

    def feeds(self) -> dict[Branch, dict[str, Array]]:
        """Inputs of the denoiser's graph at the coming step, for each branch that is needed.

        Returns:
            Nothing where the velocity is predicted, or zero. Otherwise
            ``tokens`` ``[1, L, token_dim]`` and ``timestep`` ``[1]``, shared by the branches, and
            ``context`` ``[1, text_len, text_dim]``, all float32; ``constants`` are left out.

        Raises:
            IndexError: every step is done.
        """
        needed = self.branches()
        if not needed:
            return {}
        latent = self.latent
        if self._conditioning.channels is not None:
            latent = np.concatenate([latent, self._conditioning.channels])
        shared: dict[str, Array] = {
            "tokens": patchify(latent, self._patch)[None],
            "timestep": np.array([self.timestep], dtype=np.float32),
        }
        return {branch: shared | {"context": self._contexts[branch]} for branch in needed}

    def advance(self, velocities: Mapping[Branch, Float32]) -> Float32:
        """Take one step with the network's answers to ``feeds``.

        Args:
            velocities: as for ``apply_guidance``.

        Returns:
            The new ``latent``.

        Raises:
            ValueError: as ``apply_guidance`` and ``step``.
            NonFiniteLatentError: the new latent is not finite.
        """
        velocity = self.apply_guidance(velocities)
        self.forwards += len(velocities)
        if self._is_predicted():
            self.predicted.append(self.steps_done)
        return self.step(velocity)

    def apply_guidance(self, velocities: Mapping[Branch, Float32]) -> Float32:
        """Combine the branches into the velocity of the latent, without taking a step.

        Args:
            velocities: tokens ``[L, velocity_dim]`` or ``[1, L, velocity_dim]``, float32, of the
                branches that ``feeds`` names.

        Returns:
            float32 ``[C, T, h, w]``, references included.

        Raises:
            ValueError: a branch is missing or not needed, or a velocity has another shape.
        """
        step, needed = self.steps_done, self.branches()
        if velocities.keys() != set(needed):
            raise ValueError(f"velocities of {[*velocities]}, but {[*needed]} are needed")
        if step < self._guidance.zero_steps:
            return np.zeros_like(self.latent)
        if self._is_predicted():
            assert self._cache is not None
            by_branch = {
                branch: self._cache.predict(step, self.latent, branch)
                for branch in self._guidance.branches_at(step)
            }
        else:
            # A batch of one is unpacked; any larger one does not fit and raises.
            by_branch = {
                branch: unpatchify(tokens.reshape(tokens.shape[-2:]), self._grid, self._patch)
                for branch, tokens in velocities.items()
            }
            if self._cache is not None:
                self._cache.note(step, self.latent, by_branch)
        return self._guidance.combine(step, by_branch)

    def _is_predicted(self) -> bool:
        """True where the step cache predicts the coming step; it is asked once.

        A branch that the step before did without is computed.
        """
        step = self.steps_done
        if self._cache is None or step in self._guidance.required_steps:
            return False
        if self._predicts[0] != step:
            self._predicts = step, self._cache.skips(step, self.latent)
        return self._predicts[1]

    @np.errstate(over="ignore", invalid="ignore")  # refused in one line below
    def step(self, velocity: Float32) -> Float32:
        """Take one step with a guided velocity, such as one that ``apply_guidance`` returned.

        Args:
            velocity: float32 ``[C, T, h, w]``, of the shape of ``latent``.

        Returns:
            The new ``latent``.

        Raises:
            ValueError: the shapes differ, or every step is done.
            NonFiniteLatentError: the new latent is not finite.
        """
        latent = self._sampler.step(velocity, self.latent)
        self.steps_done += 1
        if not np.isfinite(latent).all():
            raise NonFiniteLatentError(
                f"the latent is not finite after step {self.steps_done} of {self.steps}; check the "
                "bundle with `wanx verify` or export it at a higher precision"
            )
        self.latent = latent
        return latent
