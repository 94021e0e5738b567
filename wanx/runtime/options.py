"""What the user asked of a run, and what that means for a given bundle."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from typing import TypeVar

from wanx.config import ModelConfig
from wanx.errors import UsageError
from wanx.runtime.sampler import SOLVERS
from wanx.runtime.sizes import check_size
from wanx.runtime.text import check_prompt

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of a run as the user gave them; None takes the bundle's default.

    Attributes:
        prompt: what the video shows.
        negative_prompt: what guidance pushes away from.
        width: pixels.
        height: pixels.
        frames: a multiple of 4, plus 1.
        fps: frames per second of the file; the model itself has no notion of time.
        steps: denoising steps.
        guide_scale: weight of the prompt; 0 ignores it, 1 does without the negative prompt.
        shift: how far the noise schedule leans to high noise.
        solver: ``unipc`` or ``dpm++``.
        seed: of the initial noise; -1 draws one.
    """

    prompt: str | None = None
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    fps: int | None = None
    steps: int | None = None
    guide_scale: float | None = None
    shift: float | None = None
    solver: str = "unipc"
    seed: int = -1


@dataclass(frozen=True, kw_only=True)
class ResolvedRun:
    """A run with every option decided and checked; see :class:`RunOptions`."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    frames: int
    fps: int
    steps: int
    guide_scale: float
    shift: float
    solver: str
    seed: int


def resolve(options: RunOptions, config: ModelConfig) -> ResolvedRun:
    """Fill in the defaults of a model and refuse what it cannot do.

    Raises:
        UsageError: an option is out of range; the message offers what is not.
    """
    defaults = config.defaults
    prompt = defaults.prompt if options.prompt is None else options.prompt
    if prompt is None:
        raise UsageError("no prompt; say what the video should show")
    negative = options.negative_prompt
    run = ResolvedRun(
        prompt=prompt,
        negative_prompt=defaults.negative_prompt if negative is None else negative,
        width=_or(options.width, defaults.width),
        height=_or(options.height, defaults.height),
        frames=_or(options.frames, defaults.frames),
        fps=_or(options.fps, defaults.fps),
        steps=_or(options.steps, defaults.steps),
        guide_scale=_or(options.guide_scale, defaults.guide_scale),
        shift=_or(options.shift, defaults.shift),
        solver=options.solver,
        seed=secrets.randbelow(2**32) if options.seed == -1 else options.seed,
    )
    check_prompt(run.prompt)
    check_prompt(run.negative_prompt)
    check_size(run.width, run.height, run.frames, config)
    if run.solver not in SOLVERS:
        raise UsageError(f"solver is {run.solver!r}; choose {' or '.join(SOLVERS)}")
    if not 1 <= run.steps <= 1000:
        raise UsageError(f"steps is {run.steps}; choose 1 to 1000, such as {defaults.steps}")
    if not 1 <= run.fps <= 240:
        raise UsageError(f"fps is {run.fps}; choose 1 to 240, such as {defaults.fps}")
    if not (math.isfinite(run.shift) and run.shift > 0):
        raise UsageError(
            f"shift is {run.shift}; choose a positive number, such as {defaults.shift}"
        )
    if not math.isfinite(run.guide_scale):
        raise UsageError(
            f"guide scale is {run.guide_scale}; choose a finite number, such as "
            f"{defaults.guide_scale}"
        )
    if not 0 <= run.seed < 2**63:
        raise UsageError(f"seed is {run.seed}; choose 0 to {2**63 - 1}, or -1 for a random one")
    return run


def _or(value: T | None, default: T) -> T:
    return default if value is None else value
