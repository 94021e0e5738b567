"""Options of a run: as the user gave them, and with every one decided for a bundle."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

ImageInput = str | os.PathLike[str] | NDArray[np.uint8]


# Metadata of options: those that name files, and flags that are not simply the option's name.
_FILE = {"file": True}
_SIZE = {"flag": "--size"}


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
    width: int | None = field(default=None, metadata=_SIZE)
    height: int | None = field(default=None, metadata=_SIZE)
    frames: int | None = None
    fps: int | None = None
    steps: int | None = None
    guide_scale: float | None = None
    shift: float | None = None
    solver: str = "unipc"
    seed: int = -1
    image: ImageInput | None = field(default=None, metadata=_FILE)
    last_image: ImageInput | None = field(default=None, metadata=_FILE)
    video: str | os.PathLike[str] | None = field(default=None, metadata=_FILE)
    mask: str | os.PathLike[str] | None = field(default=None, metadata=_FILE)
    references: tuple[ImageInput, ...] = field(default=(), metadata=_FILE | {"flag": "--reference"})
    vace_scale: float | None = None


# The options that name files.
FILE_OPTIONS = frozenset(
    option.name for option in fields(RunOptions) if option.metadata.get("file")
)
# The name of each option on the command line.
FLAGS = {
    option.name: option.metadata.get("flag", "--" + option.name.replace("_", "-"))
    for option in fields(RunOptions)
}


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
