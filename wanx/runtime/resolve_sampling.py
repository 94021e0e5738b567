"""Resolving of what samples a run: preset, solver, noise levels, guidance."""

from __future__ import annotations

import difflib
import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from wanx.config.models import ModelConfig
from wanx.config.presets import RUN_PRESETS, RunPreset
from wanx.errors import UsageError
from wanx.runtime.options import RunOptions
from wanx.runtime.sampling.cache.easy import FIRST_STEPS
from wanx.runtime.sampling.cache.option import parse_cache
from wanx.runtime.sampling.few_step import RCM_SIGMA_MAX_IMAGE, RcmOde
from wanx.runtime.sampling.guidance import scales_of
from wanx.runtime.sampling.sampler import warp
from wanx.runtime.sampling.solvers import SOLVERS

_log = logging.getLogger("wanx.runtime")
T = TypeVar("T")
NO_PRESET = "none"
_LEAST_CACHED = 4  # steps
_ZERO_SHARE = 0.04  # of the steps, of CFG-Zero* with text alone; 1 step with images


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Fields of :class:`wanx.runtime.options.ResolvedRun` of the same names."""

    preset: str | None
    solver: str
    steps: int
    shift: float
    sigmas: tuple[float, ...] | None
    timesteps: tuple[float, ...] | None
    guide_scale: float | str
    cfg_zero: int | None
    apg: bool | None
    guidance_rescale: float | None
    cache: str | None


def resolve_sampling(
    options: RunOptions, config: ModelConfig, default_shift: float
) -> SamplingOptions:
    """Fill in the preset and the defaults of a model, and refuse what cannot be.

    Args:
        options: as the user gave them.
        config: of the model.
        default_shift: of the model at this size.

    Raises:
        UsageError: an option is out of range, or two of them disagree.
    """
    defaults = config.defaults
    preset = find_preset(options.preset or defaults.preset, config)
    solver = options.solver or (preset.solver if preset else "unipc")
    if solver not in SOLVERS:
        raise UsageError(f"solver is {solver!r}; choose {', '.join(SOLVERS)}")
    own_shift: float | None = None
    default_scale: float | str = defaults.guide_scale
    if preset is not None:
        own_shift, default_scale = preset.shift, preset.guide_scale
    shift = _first(options.shift, own_shift, default_shift)
    if not (math.isfinite(shift) and shift > 0):
        raise UsageError(f"shift is {shift}; choose a positive number, such as {default_shift}")
    steps, sigmas, timesteps = _levels(options, preset, shift, defaults.steps)
    if sigmas is None and issubclass(SOLVERS[solver], RcmOde):
        levels = RcmOde.levels(steps, shift)
        if config.image_encoder is not None:
            levels = RcmOde.levels(steps, shift, RCM_SIGMA_MAX_IMAGE)
        sigmas = tuple(float(level) for level in levels)
    guide_scale = default_scale if options.guide_scale is None else options.guide_scale
    scales = scales_of(guide_scale, steps)
    for scale in scales:
        if not math.isfinite(scale):
            raise UsageError(
                f"guide scale is {scale}; choose a finite number, such as {defaults.guide_scale}"
            )
    if preset is not None and preset.guide_scale == 1 and max(scales) > 1:
        _log.warning(
            "guide scale %s with preset %s: models distilled to few steps blur with guidance",
            guide_scale, preset.name,
        )  # fmt: skip
    _require_guidance(options, scales)
    zero = None
    if options.cfg_zero:
        wanted = round(_ZERO_SHARE * steps) if config.task == "t2v" else 1
        zero = min(max(wanted, 1), steps - 1)
    return SamplingOptions(
        preset=None if preset is None else preset.name, solver=solver, steps=steps, shift=shift,
        sigmas=sigmas, timesteps=timesteps, guide_scale=guide_scale, cfg_zero=zero,
        apg=options.apg or None, guidance_rescale=options.guidance_rescale or None,
        cache=_cache(options, preset, solver, steps),
    )  # fmt: skip


def find_preset(name: str | None, config: ModelConfig) -> RunPreset | None:
    """Give the preset of a name; None for ``none`` and where no name is given.

    Raises:
        UsageError: there is none of that name, or it is not for the model's task.
    """
    if name is None or name == NO_PRESET:
        return None
    preset = RUN_PRESETS.get(name)
    if preset is None:
        near = difflib.get_close_matches(name, RUN_PRESETS, 1, cutoff=0.4)
        advice = f"did you mean {near[0]}?" if near else f"choose {', '.join(RUN_PRESETS)}"
        raise UsageError(f"there is no preset {name!r:.80}; {advice}")
    if config.task not in preset.tasks:
        raise UsageError(
            f"preset {name} is for {' and '.join(preset.tasks)}, and this is a model for "
            f"{config.task}; choose another, or --preset {NO_PRESET}"
        )
    return preset


def _levels(
    options: RunOptions, preset: RunPreset | None, shift: float, default_steps: int
) -> tuple[int, tuple[float, ...] | None, tuple[float, ...] | None]:
    """Number of steps, and noise levels and timesteps where a list gives them."""
    timesteps, sigmas, warped = options.timesteps, options.sigmas, options.warp
    if timesteps and sigmas:
        raise UsageError("--timesteps and --sigmas do not go together; give one of them")
    if warped and not timesteps:
        raise UsageError("--warp is for the list of --timesteps; give one")
    if options.shift is not None and (sigmas or (timesteps and not warped)):
        raise UsageError("--shift changes no list of noise levels; add --warp to --timesteps")
    own = preset if preset is not None and not (timesteps or sigmas) else None
    fed: tuple[float, ...] | None = None
    if own is not None and own.timesteps:
        timesteps, warped = own.timesteps, own.warp
        if own.sigmas:
            fed, sigmas, timesteps = own.timesteps, own.sigmas, ()
    if timesteps:
        _require_falling("timesteps", timesteps, 1000)
        levels = np.array(timesteps, np.float64) / 1000
        sigmas = tuple(float(level) for level in (warp(levels, shift) if warped else levels))
    if not sigmas:
        steps = _first(options.steps, None if own is None else own.steps, default_steps)
        if not 1 <= steps <= 1000:
            raise UsageError(f"steps is {steps}; choose 1 to 1000, such as {default_steps}")
        return steps, None, None
    _require_falling("sigmas", sigmas, 1)
    if options.steps not in (None, len(sigmas)):
        of = f"preset {own.name} takes" if own is not None else "the list has"
        raise UsageError(f"steps is {options.steps}, and {of} {len(sigmas)}; leave --steps out")
    return len(sigmas), sigmas, fed


def _require_falling(name: str, values: Sequence[float], most: float) -> None:
    outside = next((value for value in values if not 0 < value <= most), None)
    if outside is not None:
        raise UsageError(f"{name} has {outside:g}; give numbers above 0 and up to {most:g}")
    for before, after in itertools.pairwise(values):
        if after >= before:
            raise UsageError(f"{name} has {after:g} behind {before:g}; give numbers that fall")
    if len(values) > 1000:
        raise UsageError(f"{name} has {len(values)} numbers; give at most 1000")


def _require_guidance(options: RunOptions, scales: Sequence[float]) -> None:
    """Refuse variants of guidance where there is none, or that exclude each other."""
    if options.cfg_zero and options.apg:
        raise UsageError("--cfg-zero and --apg do not go together; choose one of them")
    rescale = options.guidance_rescale
    if rescale is not None and not 0 <= rescale <= 1:
        raise UsageError(f"guidance rescale is {rescale:g}; choose 0 to 1, such as 0.7")
    flags = {"--cfg-zero": options.cfg_zero, "--apg": options.apg, "--guidance-rescale": rescale}
    used = [flag for flag, value in flags.items() if value]
    if used and all(scale in (0, 1) for scale in scales):
        raise UsageError(f"{used[0]} needs guidance; choose a --guide-scale other than 1")
    if options.cfg_zero and len(scales) < 2:
        raise UsageError("--cfg-zero needs 2 steps or more; give more --steps")


def _cache(options: RunOptions, preset: RunPreset | None, solver: str, steps: int) -> str | None:
    """The step cache, which few steps and fresh noise leave nothing to predict for."""
    option = parse_cache(options.cache, options.speedup)
    if option is None:
        return None
    flag = "--cache" if options.speedup is None else "--speedup"
    if preset is not None and preset.guide_scale == 1:
        raise UsageError(f"{flag} does not go with preset {preset.name}, whose steps are few")
    if SOLVERS[solver].stochastic:
        raise UsageError(f"{flag} does not go with solver {solver}, which draws noise at each step")
    least = _LEAST_CACHED if option.speedup is not None else FIRST_STEPS + 2
    if steps < least:
        raise UsageError(f"{flag} is for {least} steps or more, not {steps}; give more --steps")
    return str(option)


def _first(*values: T | None) -> T:
    """The first value that is there."""
    return next(value for value in values if value is not None)
