"""Resolving of options into a run: defaults of the model, size from the inputs, checks."""

from __future__ import annotations

import math
import os
import secrets
from typing import TypeVar

from wanx.config.models import ModelConfig
from wanx.errors import UsageError
from wanx.runtime.inputs.reading import Inputs
from wanx.runtime.options import ImageInput, ResolvedRun, RunOptions
from wanx.runtime.resolve_sampling import resolve_sampling
from wanx.runtime.sizes import check_size, control_shape, latent_shape, size_for_image
from wanx.runtime.text import check_prompt

T = TypeVar("T")


def resolve(options: RunOptions, config: ModelConfig, inputs: Inputs) -> ResolvedRun:
    """Fill in the defaults of a model and refuse what it cannot do.

    Args:
        options: as the user gave them.
        config: of the model.
        inputs: the images and videos that the options name.

    Raises:
        UsageError: an option is out of range; the message offers what is not.
    """
    defaults = config.defaults
    prompt = _default(options.prompt, defaults.prompt)
    if prompt is None:
        raise UsageError("no prompt; say what the video should show")
    width, height, frames = _size(options, config, inputs)
    # By the size that was asked for, as in the reference: an image may make it smaller.
    default_shift = config.default_shift(
        _default(options.width, defaults.width), _default(options.height, defaults.height)
    )
    sampling = resolve_sampling(options, config, default_shift)
    run = ResolvedRun(
        prompt=prompt,
        negative_prompt=_default(options.negative_prompt, defaults.negative_prompt),
        width=width,
        height=height,
        frames=frames,
        fps=_default(options.fps, defaults.fps),
        seed=secrets.randbelow(2**32) if options.seed == -1 else options.seed,
        image=_name(options.image),
        last_image=_name(options.last_image),
        video=_name(options.video),
        mask=_name(options.mask),
        references=tuple(str(_name(item)) for item in options.references) or None,
        vace_scale=_default(options.vace_scale, 1.0) if config.task == "vace" else None,
        **vars(sampling),
    )
    check_prompt(run.prompt)
    check_prompt(run.negative_prompt)
    check_size(run.width, run.height, run.frames, config)
    if not 1 <= run.fps <= 240:
        raise UsageError(f"fps is {run.fps}; choose 1 to 240, such as {defaults.fps}")
    if run.vace_scale is not None and not math.isfinite(run.vace_scale):
        raise UsageError(f"vace scale is {run.vace_scale}; choose a finite number, such as 1")
    if not 0 <= run.seed < 2**63:
        raise UsageError(f"seed is {run.seed}; choose 0 to {2**63 - 1}, or -1 for a random one")
    return run


def _size(options: RunOptions, config: ModelConfig, inputs: Inputs) -> tuple[int, int, int]:
    """Width, height and frames: as asked, or in the shape of the image or of the control video."""
    defaults = config.defaults
    width = _default(options.width, defaults.width)
    height = _default(options.height, defaults.height)
    frames = _default(options.frames, defaults.frames)
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
        available = len(inputs.video.times)
        frames, height, width = control_shape(
            min(available, _default(options.frames, available)),
            inputs.video.height, inputs.video.width,
            area=width * height, max_tokens=tokens, config=config,
        )  # fmt: skip
    return width, height, frames


def _name(item: ImageInput | None) -> str | None:
    if item is None or isinstance(item, (str, os.PathLike)):
        return None if item is None else os.path.basename(os.fspath(item))
    return "pixels"


def _default(value: T | None, default: T) -> T:
    return default if value is None else value
