"""The images and videos that a run starts from, read before anything is computed."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wanx.config.models import Task
from wanx.errors import UsageError
from wanx.runtime.inputs.image import read_image
from wanx.runtime.inputs.video_input import VideoInput, open_video
from wanx.runtime.options import Picture, RunOptions

Pixels = NDArray[np.uint8]

_TAKEN: dict[Task, tuple[str, ...]] = {
    "t2v": (),
    "i2v": ("image",),
    "flf2v": ("image", "last_image"),
    "vace": ("video", "mask", "references", "vace_scale"),
}
_NEEDED: dict[Task, tuple[str, ...]] = {"i2v": ("image",), "flf2v": ("image", "last_image")}
# As the command line calls them.
_FLAGS = {
    "image": "--image",
    "last_image": "--last-image",
    "video": "--video",
    "mask": "--mask",
    "references": "--reference",
    "vace_scale": "--vace-scale",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """What a run starts from; images are ``[H, W, 3]``, and what the task has not is None."""

    image: Pixels | None = None
    last_image: Pixels | None = None
    video: VideoInput | None = None
    mask: VideoInput | None = None
    references: tuple[Pixels, ...] = ()


def read_inputs(options: RunOptions, task: Task) -> Inputs:
    """Read what the options name, if it is what the task takes.

    Raises:
        UsageError: something is missing, does not exist or is not for this task, or the mask has
            not as many frames as its video.
        CorruptInputError: a file is damaged.
    """
    values = {name: getattr(options, name) for name in _FLAGS}
    given = [n for n, value in values.items() if value is not None and not isinstance(value, tuple)]
    if options.references:
        given.append("references")
    for name in given:
        if name not in _TAKEN[task]:
            takes = ", ".join(_FLAGS[taken] for taken in _TAKEN[task]) or "a prompt only"
            raise UsageError(f"a bundle for {task} takes no {_FLAGS[name]}, it takes {takes}")
    for name in _NEEDED.get(task, ()):
        if name not in given:
            raise UsageError(f"a bundle for {task} needs {_FLAGS[name]}; give an image")
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


def _pixels(picture: Picture | None) -> Pixels | None:
    if picture is None:
        return None
    if isinstance(picture, (str, os.PathLike)):
        return read_image(picture)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise UsageError(
            f"an image must be uint8 [height, width, 3], not {picture.dtype} "
            f"{list(picture.shape)}; convert it to RGB"
        )
    return picture
