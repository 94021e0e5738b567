"""What the user asked of a run, and what that means for a given bundle."""

from __future__ import annotations

import math
import os
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from wanx.config.models import ModelConfig
from wanx.errors import UsageError
from wanx.runtime.inputs.control import control_shape
from wanx.runtime.sampling.sampler import SOLVERS
from wanx.runtime.sizes import check_size, latent_shape, size_for_image
from wanx.runtime.text import check_prompt

if TYPE_CHECKING:
    from wanx.runtime.inputs.reading import Inputs

T = TypeVar("T")
Picture = str | os.PathLike[str] | NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of a run as the user gave them; None takes the bundle's default.

    Attributes:
        prompt: what the video shows.
        negative_prompt: what guidance pushes away from.
        width: pixels; where an image or a control video sets the shape, width and height only
            say how large its area may be.
        height: pixels, likewise.
        frames: a multiple of 4, plus 1; of a control video, as many at most.
        fps: frames per second of the file; the model itself has no notion of time.
        steps: denoising steps.
        guide_scale: weight of the prompt; 0 ignores it, 1 does without the negative prompt.
        shift: how far the noise schedule leans to high noise.
        solver: ``unipc`` or ``dpm++``.
        seed: of the initial noise; -1 draws one.
        image: file or pixels ``[H, W, 3]`` of the first frame (i2v, flf2v).
        last_image: likewise of the last frame (flf2v).
        video: file that controls the video (vace).
        mask: video that is white where ``video`` is to be drawn anew (vace).
        references: images of what the video shows (vace).
        vace_scale: weight of the control; 1 if left out (vace).
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
    image: Picture | None = None
    last_image: Picture | None = None
    video: str | os.PathLike[str] | None = None
    mask: str | os.PathLike[str] | None = None
    references: tuple[Picture, ...] = ()
    vace_scale: float | None = None


@dataclass(frozen=True, kw_only=True)
class ResolvedRun:
    """A run with every option decided and checked; see :class:`RunOptions`.

    Files are named here, and None where there are none; their pixels are in
    :class:`wanx.runtime.inputs.reading.Inputs`.
    """

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
    image: str | None = None
    last_image: str | None = None
    video: str | None = None
    mask: str | None = None
    references: tuple[str, ...] | None = None
    vace_scale: float | None = None


def resolve(options: RunOptions, config: ModelConfig, inputs: Inputs) -> ResolvedRun:
    """Fill in the defaults of a model and refuse what it cannot do.

    Args:
        options: as the user gave them.
        config: of the model.
        inputs: what the options name.

    Raises:
        UsageError: an option is out of range; the message offers what is not.
    """
    defaults = config.defaults
    prompt = defaults.prompt if options.prompt is None else options.prompt
    if prompt is None:
        raise UsageError("no prompt; say what the video should show")
    negative = options.negative_prompt
    width, height, frames = _size(options, config, inputs)
    scale = options.vace_scale
    run = ResolvedRun(
        prompt=prompt,
        negative_prompt=defaults.negative_prompt if negative is None else negative,
        width=width,
        height=height,
        frames=frames,
        fps=_or(options.fps, defaults.fps),
        steps=_or(options.steps, defaults.steps),
        guide_scale=_or(options.guide_scale, defaults.guide_scale),
        shift=_or(options.shift, defaults.shift),
        solver=options.solver,
        seed=secrets.randbelow(2**32) if options.seed == -1 else options.seed,
        image=_name(options.image),
        last_image=_name(options.last_image),
        video=_name(options.video),
        mask=_name(options.mask),
        references=tuple(str(_name(item)) for item in options.references) or None,
        vace_scale=_or(scale, 1.0) if config.task == "vace" else None,
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
    if run.vace_scale is not None and not math.isfinite(run.vace_scale):
        raise UsageError(f"vace scale is {run.vace_scale}; choose a finite number, such as 1")
    if not 0 <= run.seed < 2**63:
        raise UsageError(f"seed is {run.seed}; choose 0 to {2**63 - 1}, or -1 for a random one")
    return run


def _size(options: RunOptions, config: ModelConfig, inputs: Inputs) -> tuple[int, int, int]:
    """Width, height and frames: as asked, or in the shape of the image or of the control video."""
    defaults = config.defaults
    width, height = _or(options.width, defaults.width), _or(options.height, defaults.height)
    frames = _or(options.frames, defaults.frames)
    check_size(width, height, frames, config)
    if inputs.last_image is not None and frames == 1:
        least = config.vae.temporal_stride + 1
        raise UsageError(f"a first and a last image need {least} frames or more, not 1")
    if inputs.image is not None:
        image_height, image_width, _ = inputs.image.shape
        width, height = size_for_image(image_height, image_width, width * height, config)
    elif inputs.video is not None:
        # As many tokens as the model's own number of frames has at this area.
        _, times, rows, columns = latent_shape(width, height, defaults.frames, config.vae)
        patch_time, patch_height, patch_width = config.dit.patch_size
        tokens = times * rows * columns // (patch_time * patch_height * patch_width)
        given = len(inputs.video.times)
        frames, height, width = control_shape(
            min(given, _or(options.frames, given)), inputs.video.height, inputs.video.width,
            area=width * height, max_tokens=tokens, config=config,
        )  # fmt: skip
    return width, height, frames


def _name(item: Picture | None) -> str | None:
    if item is None or isinstance(item, (str, os.PathLike)):
        return None if item is None else os.path.basename(os.fspath(item))
    return "pixels"


def _or(value: T | None, default: T) -> T:
    return default if value is None else value
