"""Images and videos that a run starts from, read before anything is computed."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wanx.config.models import Task
from wanx.errors import UsageError
from wanx.runtime.inputs.image import read_image
from wanx.runtime.inputs.video_input import VideoInput, open_video
from wanx.runtime.options import FLAGS, ImageInput, RunOptions

Pixels = NDArray[np.uint8]

# The options of a run that some tasks only accept, and those that a task requires.
ACCEPTED: dict[Task, tuple[str, ...]] = {
    "t2v": (),
    "i2v": ("image",),
    "flf2v": ("image", "last_image"),
    "vace": ("video", "mask", "references", "vace_scale"),
}
REQUIRED: dict[Task, tuple[str, ...]] = {"i2v": ("image",), "flf2v": ("image", "last_image")}


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """Images ``[H, W, 3]`` and videos that a run starts from; None where the task has none."""

    image: Pixels | None = None
    last_image: Pixels | None = None
    video: VideoInput | None = None
    mask: VideoInput | None = None
    references: tuple[Pixels, ...] = ()


def read_inputs(options: RunOptions, task: Task) -> Inputs:
    """Read the images and videos that the options name, if the task accepts them.

    Raises:
        UsageError: something is missing, does not exist or is not for this task, or the mask has
            not as many frames as its video.
        CorruptInputError: a file is damaged.
    """
    names = dict.fromkeys(name for accepted in ACCEPTED.values() for name in accepted)
    values = {name: getattr(options, name) for name in names}
    present = [
        name
        for name, value in values.items()
        if value is not None and not (isinstance(value, tuple) and not value)
    ]
    for name in present:
        if name not in ACCEPTED[task]:
            takes = ", ".join(FLAGS[accepted] for accepted in ACCEPTED[task]) or "a prompt only"
            raise UsageError(f"a bundle for {task} takes no {FLAGS[name]}, it takes {takes}")
    for name in REQUIRED.get(task, ()):
        if name not in present:
            raise UsageError(f"a bundle for {task} needs {FLAGS[name]}; give an image")
    if options.mask is not None and options.video is None:
        raise UsageError("--mask says what to draw anew in a video; give --video too")
    video, mask = (
        None if path is None else open_video(path) for path in (options.video, options.mask)
    )
    if video is not None and mask is not None and len(video.times) != len(mask.times):
        raise UsageError(
            f"{options.mask} has {len(mask.times)} frames and {options.video} has "
            f"{len(video.times)}; give a mask for each frame"
        )
    return Inputs(
        image=_pixels(options.image),
        last_image=_pixels(options.last_image),
        video=video,
        mask=mask,
        references=tuple(
            pixels for item in options.references if (pixels := _pixels(item)) is not None
        ),
    )


def _pixels(image: ImageInput | None) -> Pixels | None:
    if image is None:
        return None
    if isinstance(image, (str, os.PathLike)):
        return read_image(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise UsageError(
            f"an image must be uint8 [height, width, 3], not {image.dtype} "
            f"{list(image.shape)}; convert it to RGB"
        )
    return image
