"""Options of a calibration: prompts, steps and size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from wanx.config.models import ModelConfig
from wanx.errors import UsageError
from wanx.exporter.calibration.prompts import calibration_set
from wanx.runtime.inputs.reading import Inputs, read_inputs
from wanx.runtime.options import ResolvedRun, RunOptions
from wanx.runtime.resolve import resolve
from wanx.runtime.sizes import latent_shape, size_for_image

_DEFAULT_FRAMES = 17  # of a clip whose length nobody chose
_GOLDEN_TOKENS = 96  # where nothing but golden steps is recorded


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """Options of a calibration.

    Attributes:
        file: JSON Lines of prompts, with the images that the task takes; None is the shipped set.
        prompts: how many of them, from the first.
        steps: denoising steps of each trajectory.
        width: pixels; None takes the model's own size where it has at most ``max_tokens``, and
            otherwise a small one of the same shape.
        height: pixels, likewise.
        frames: a multiple of 4, plus 1, likewise.
        max_tokens: see ``width``.
        golden_steps: steps of the first trajectory that the bundle keeps, spread from the first
            to the last; 0 keeps none.
        fresh: start anew even if there is a saved calibration.
    """

    file: Path | None = None
    prompts: int = 4
    steps: int = 6
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    max_tokens: int = 1280
    golden_steps: int = 3
    fresh: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers that no calibration has.

        Raises:
            UsageError: a number is out of range.
        """
        for flag, value, minimum, maximum in (
            ("--calibration-prompts", self.prompts, 1, 10_000),
            ("--calibration-steps", self.steps, 1, 1000),
            ("--golden-steps", self.golden_steps, 0, 100),
        ):
            if not minimum <= value <= maximum:
                raise UsageError(f"{flag} is {value}; choose {minimum} to {maximum}")


# Runs with the images and videos that they start from.
PlannedRuns = Sequence[tuple[ResolvedRun, Inputs]]


def golden_only(options: CalibrationOptions) -> CalibrationOptions:
    """One short trajectory, all of whose steps are kept."""
    return replace(options, prompts=1, steps=options.golden_steps, max_tokens=_GOLDEN_TOKENS)


def planned_runs(options: CalibrationOptions, config: ModelConfig) -> PlannedRuns:
    """Read and check what :func:`~wanx.exporter.calibration.calibrate.calibrate` would run.

    Raises:
        WanxError: the calibration file, an input that it names or an option cannot be.
    """
    runs = []
    for line in calibration_set(options.file, config, limit=options.prompts):
        sized = _with_size(line, options, config)
        inputs = read_inputs(sized, config.task)
        runs.append((resolve(sized, config, inputs), inputs))
    return runs


def _with_size(run: RunOptions, options: CalibrationOptions, config: ModelConfig) -> RunOptions:
    """The size that the options ask for, else the run itself, else one that costs little."""
    defaults = config.defaults
    width, height, frames = defaults.width, defaults.height, defaults.frames
    _, times, rows, columns = latent_shape(width, height, frames, config.vae)
    patch_time, patch_height, patch_width = config.dit.patch_size
    patch = patch_height * patch_width
    if times // patch_time * rows * columns // patch > options.max_tokens:
        frames = min(frames, _DEFAULT_FRAMES)
        times = (frames - 1) // config.vae.temporal_stride + 1
        cells = options.max_tokens / (times // patch_time) * patch
        area = cells * config.vae.spatial_stride**2
        width, height = size_for_image(height, width, area, config)
    return replace(
        run,
        width=_first_set(options.width, run.width, width),
        height=_first_set(options.height, run.height, height),
        frames=_first_set(options.frames, run.frames, frames),
        # A distilled model's steps are those of its preset.
        steps=None if defaults.preset else options.steps,
        # Every step is computed, with the same branches.
        guide_scale=None if isinstance(run.guide_scale, str) else run.guide_scale,
        cfg_zero=None,
        cache=None,
        speedup=None,
    )


def _first_set(requested: int | None, of_run: int | None, default: int) -> int:
    return next(value for value in (requested, of_run, default) if value is not None)
