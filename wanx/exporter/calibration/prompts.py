"""Prompts and images of a calibration: the user's own, or the shipped ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wanx.config.models import ModelConfig
from wanx.errors import UsageError, WanxError
from wanx.runtime.batch import Job, read_jobs
from wanx.runtime.inputs.image import MAX_PIXELS
from wanx.runtime.inputs.reading import read_inputs
from wanx.runtime.options import RunOptions
from wanx.runtime.resolve import resolve
from wanx.runtime.sizes import check_size

_DISTINCT_IMAGES = 16  # made once each, so that a long file does not fill the memory
_PAN = 8  # the last frame of a synthetic clip is the first one, moved by 1/8 of its width
# Levels by which luminance, red against green, and yellow against blue change R, G and B.
_OPPONENT = np.array([(48, 48, 48), (14, -14, 0), (8, 8, -16)], dtype=np.float64)

# First and last image by index, height and width.
_Images = dict[tuple[int, int, int], tuple[NDArray[np.uint8], NDArray[np.uint8]]]


def calibration_set(
    file: Path | None, config: ModelConfig, *, limit: int | None = None
) -> list[RunOptions]:
    """Read and check what to run for calibration.

    A line takes the keys of :func:`wanx.runtime.batch.read_jobs`, so the prompts of a batch can be
    used as they are. Without a seed it gets its index among the lines, from 0. Where the task needs
    images and a line names none, it gets a synthetic picture, moved sideways for a last frame.

    Args:
        file: JSON Lines, an object a line; None takes the prompts that come with wanx.
        config: of the model.
        limit: take only so many lines, from the first; the others are not checked.

    Returns:
        Options that :func:`wanx.runtime.resolve.resolve` accepts, each with a seed.

    Raises:
        UsageError: the file is missing, not UTF-8 or empty, or a line asks for what the model
            cannot do; the message names the line.
        CorruptInputError: a line is not a JSON object, or a file that it names is damaged.
        WanxError: the operating system refuses to read a file.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"the number of calibration prompts is {limit}; choose 1 or more")
    if file is None:
        name = "tiny" if config.name.startswith("tiny") else "default"
        file = Path(__file__).with_name(f"{name}_prompts.jsonl")
    images: _Images = {}
    runs = []
    for index, job in enumerate(read_jobs(file, Path(), RunOptions(), suffix="")[:limit]):
        try:
            runs.append(_with_images_and_seed(job, index, config, images))
        except WanxError as error:
            reason = str(error).removeprefix(f"{file}: ")
            raise type(error)(f"{job.name} of {file}: {reason}") from None
    return runs


def _with_images_and_seed(job: Job, index: int, config: ModelConfig, images: _Images) -> RunOptions:
    options = job.options
    if isinstance(options, WanxError):
        raise options
    if options.seed == -1:
        options = replace(options, seed=index)
    if config.task in ("i2v", "flf2v") and options.image is None and options.last_image is None:
        height = config.defaults.height if options.height is None else options.height
        width = config.defaults.width if options.width is None else options.width
        check_size(width, height, 1, config)
        if width * height > MAX_PIXELS:
            raise UsageError(f"size is {width}x{height}; choose at most {MAX_PIXELS} pixels")
        key = index % _DISTINCT_IMAGES, height, width
        if key not in images:
            first = natural_image(*key)
            images[key] = first, np.roll(first, width // _PAN, axis=1)
        first, last = images[key]
        last_image = last if config.task == "flf2v" else None
        options = replace(options, image=first, last_image=last_image)
    # The files are read again when their turn comes: a mistake in the last line shows now.
    resolve(options, config, read_inputs(options, config.task))
    return options


def natural_image(seed: int, height: int, width: int) -> NDArray[np.uint8]:
    """Draw a picture with the statistics of photographs: soft shapes on coloured 1/f noise.

    The amplitude spectrum of natural scenes falls as 1/f (D. J. Field, "Relations between the
    statistics of natural images and the response properties of cortical cells", J. Opt. Soc. Am. A
    4, 1987), and most of their variance is in the luminance. The picture wraps around its borders.

    Args:
        seed: 0 or more; the same one draws the same picture.
        height: pixels.
        width: pixels.

    Returns:
        [H, W, 3] in RGB.
    """
    generator = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf  # no constant part
    white = generator.standard_normal((3, height, width))
    noise = np.fft.irfft2(np.fft.rfft2(white) / frequency, s=(height, width))
    noise /= np.maximum(noise.std(axis=(1, 2), keepdims=True), 1e-12)
    image: NDArray[np.float64] = np.einsum("chw,cr->hwr", noise, _OPPONENT)
    image += generator.uniform(90, 165, size=3)

    y, x = np.arange(height)[:, None], np.arange(width)
    for _ in range(int(generator.integers(3, 7))):
        top, left = generator.uniform(0, (height, width))
        dy = (y - top + height / 2) % height - height / 2
        dx = (x - left + width / 2) % width - width / 2
        angle = generator.uniform(0, np.pi)
        radii = generator.uniform(0.05, 0.25, size=2) * min(height, width)
        along = (np.cos(angle) * dx + np.sin(angle) * dy) / radii[0]
        across = (np.cos(angle) * dy - np.sin(angle) * dx) / radii[1]
        softness = generator.uniform(0.03, 0.3)
        covered = 0.5 + 0.5 * np.tanh((1 - np.hypot(along, across)) / softness)
        image += covered[..., None] * (generator.uniform(20, 235, size=3) - image)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
