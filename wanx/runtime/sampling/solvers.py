"""Solvers by name, and the sampler of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from wanx.errors import UsageError
from wanx.runtime.sampling.few_step import Euler, Lcm, Rcm, RcmOde
from wanx.runtime.sampling.multistep import DPMPlusPlus, UniPC
from wanx.runtime.sampling.sampler import Draw, Float64, Sampler

SOLVERS: dict[str, type[Sampler]] = {
    "unipc": UniPC, "dpm++": DPMPlusPlus, "euler": Euler, "lcm": Lcm, "rcm": Rcm,
    "rcm-ode": RcmOde,
}  # fmt: skip


def make_sampler(
    solver: str,
    steps: int,
    shift: float,
    sigmas: Float64 | None = None,
    *,
    timesteps: Sequence[float] | None = None,
    draw: Draw | None = None,
) -> Sampler:
    """Build the sampler of one run.

    Args:
        solver: A key of `SOLVERS`.
        steps: Number of model evaluations (per guidance branch), at least 1.
        shift: Timestep shift s > 0; the grid becomes ``s·σ / (1 + (s - 1)·σ)``.
        sigmas: Noise levels after the shift, float64 [steps + 1], strictly decreasing from at most
            1 to exactly 0. They replace the solver's grid, and ``shift`` is then unused. Levels
            rounded to float32 may move a timestep by one.
        timesteps: What the model is fed at each step, where that is not the solver's own function
            of the noise levels.
        draw: Gives standard normal noise of a shape, for solvers that draw.

    Raises:
        UsageError: An argument is outside these limits.
    """
    if solver not in SOLVERS:
        raise UsageError(f"unknown solver {solver!r}; choose one of: {', '.join(SOLVERS)}")
    if steps < 1:
        raise UsageError(f"steps is {steps}; it must be at least 1")
    if not (math.isfinite(shift) and shift > 0):
        raise UsageError(f"shift is {shift}; it must be a finite number above 0, such as 5")
    if sigmas is None:
        sigmas = np.append(SOLVERS[solver].levels(steps, shift), 0.0)
        if not _decreasing(sigmas):
            raise UsageError(
                f"shift {shift} with {steps} steps leaves noise levels that cannot be told apart; "
                "use a shift between 0.1 and 100 or fewer steps"
            )
    else:
        sigmas = np.array(sigmas, np.float64)
        if sigmas.shape != (steps + 1,):
            raise UsageError(f"sigmas has shape {sigmas.shape}; {steps} steps need {(steps + 1,)}")
        if not (_decreasing(sigmas) and sigmas[0] <= 1 and sigmas[-1] == 0):
            raise UsageError(f"sigmas must decrease strictly from at most 1 to 0, got {sigmas}")
    own = None if timesteps is None else tuple(timesteps)
    if own is not None and len(own) != steps:
        raise UsageError(f"there are {len(own)} timesteps; {steps} steps need {steps}")
    return SOLVERS[solver](sigmas, own, draw)


def _decreasing(sigmas: Float64) -> bool:
    return bool(np.isfinite(sigmas).all() and (np.diff(sigmas) < 0).all())
