"""One video on its way from noise to latent, step by step; who runs the network is left open.

The pipeline runs one trajectory to its end. Others keep many of them in step over one network, or
replay velocities that they stored.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from wanx.config.models import ModelConfig
from wanx.errors import WanxError
from wanx.runtime.inputs.conditioning import Conditioning, noise_shape
from wanx.runtime.options import ResolvedRun
from wanx.runtime.sampling.guidance import Branch, branches, guide
from wanx.runtime.sampling.noise import randn
from wanx.runtime.sampling.sampler import Sampler, make_sampler
from wanx.runtime.sessions.base import Array
from wanx.runtime.tokens import patchify, rope_tables, token_grid, unpatchify

Float32 = NDArray[np.float32]


class Trajectory:
    """The latent of one run between two steps: says what the network is fed, takes its answer.

    Each step is ``feeds``, the network, then ``advance``; or ``step_with`` alone, where the guided
    velocity is known.

    Attributes:
        constants: inputs of the denoiser's graph that are the same at every step and branch.
        steps: how many there are.
        step: how many of them are done.
        latent: float32 ``[C, T, h, w]``, at the noise level of the coming step; references are its
            first frames.
    """

    def __init__(
        self,
        run: ResolvedRun,
        contexts: Mapping[Branch, Float32],
        given: Conditioning,
        config: ModelConfig,
        *,
        latent: Float32 | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        """Stand at the noise of a run.

        Args:
            run: names seed, size, steps, shift, solver and guidance scale.
            contexts: text features ``[1, text_len, text_dim]`` of the branches that the scale
                needs, at least.
            given: what the network sees beside noise and text.
            config: of the model.
            latent: float32 ``[C, T, h, w]`` to start from; None draws the noise of the seed.
            sampler: a new one to step with; None makes that of the run.

        Raises:
            UsageError: there is no sampler for these options.
            ValueError: the initial latent has another shape than the noise.
        """
        shape = noise_shape(run, given, config)
        if latent is not None and latent.shape != shape:
            raise ValueError(f"the initial latent has shape {latent.shape}, the run has {shape}")
        self._patch = config.dit.patch_size
        self._grid = token_grid(shape, self._patch)
        self._sampler = sampler or make_sampler(run.solver, run.steps, run.shift)
        self._contexts = {branch: contexts[branch] for branch in branches(run.guide_scale)}
        self._scale = run.guide_scale
        self._given = given
        cos, sin = rope_tables(self._grid, config.dit.rope_dims)
        self.constants: dict[str, Array] = {"rope_cos": cos, "rope_sin": sin} | given.constants
        self.steps = len(self._sampler.timesteps)
        self.step = 0
        self.latent = randn(shape, run.seed) if latent is None else latent

    @property
    def timestep(self) -> float:
        """What the network is fed at the coming step; IndexError once every step is done."""
        return float(self._sampler.timesteps[self.step])

    @property
    def done(self) -> bool:
        """Whether every step is done."""
        return self.step == self.steps

    @property
    def result(self) -> Float32:
        """The latent without its references, float32 ``[C, T, h, w]``; clean once all is done."""
        return self.latent[:, self._given.references :]

    def feeds(self) -> dict[Branch, dict[str, Array]]:
        """Inputs of the denoiser's graph at the coming step, for each branch that is needed.

        Returns:
            ``tokens`` ``[1, L, token_dim]`` and ``timestep`` ``[1]``, shared by the branches, and
            ``context`` ``[1, text_len, text_dim]``, all float32; ``constants`` are left out.

        Raises:
            IndexError: every step is done.
        """
        whole = self.latent
        if self._given.channels is not None:
            whole = np.concatenate([whole, self._given.channels])
        shared: dict[str, Array] = {
            "tokens": patchify(whole, self._patch)[None],
            "timestep": np.array([self.timestep], dtype=np.float32),
        }
        return {branch: shared | {"context": text} for branch, text in self._contexts.items()}

    def advance(self, velocities: Mapping[Branch, Float32]) -> Float32:
        """Take one step with the network's answers to ``feeds``.

        Args:
            velocities: as for ``guided``.

        Returns:
            The new ``latent``.

        Raises:
            ValueError: as ``guided`` and ``step_with``.
            WanxError: the new latent is not finite.
        """
        return self.step_with(self.guided(velocities))

    def guided(self, velocities: Mapping[Branch, Float32]) -> Float32:
        """Combine the branches into the velocity of the latent, without taking a step.

        Args:
            velocities: tokens ``[L, velocity_dim]`` or ``[1, L, velocity_dim]``, float32, of the
                branches that ``feeds`` names.

        Returns:
            float32 ``[C, T, h, w]``, references included.

        Raises:
            ValueError: a branch is missing or not needed, or a velocity has another shape.
        """
        if velocities.keys() != self._contexts.keys():
            raise ValueError(f"velocities of {[*velocities]}, but {[*self._contexts]} are needed")
        # A batch of one is unpacked; any larger one does not fit and raises.
        rows = {branch: tokens.reshape(tokens.shape[-2:]) for branch, tokens in velocities.items()}
        if len(rows) == 1:
            (velocity,) = rows.values()
        else:
            velocity = guide(rows["conditional"], rows["unconditional"], self._scale)
        return unpatchify(velocity, self._grid, self._patch)

    def step_with(self, velocity: Float32) -> Float32:
        """Take one step with a guided velocity, such as one that ``guided`` returned.

        Args:
            velocity: float32 ``[C, T, h, w]``, of the shape of ``latent``.

        Returns:
            The new ``latent``.

        Raises:
            ValueError: the shapes differ, or every step is done.
            WanxError: the new latent is not finite.
        """
        latent = self._sampler.step(velocity, self.latent)
        self.step += 1
        if not np.isfinite(latent).all():
            raise WanxError(
                f"the latent is not finite after step {self.step} of {self.steps}; check the "
                "bundle with `wanx verify` or export it at a higher precision"
            )
        self.latent = latent
        return latent
