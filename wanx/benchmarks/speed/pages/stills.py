"""Frames of the videos that the trials made."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wanx.benchmarks.speed.pages.page import Still
from wanx.benchmarks.speed.results import Results
from wanx.benchmarks.speed.suite import trial_name
from wanx.errors import WanxError


def read_stills(results: Results, folder: Path) -> dict[tuple[int, int], tuple[Still, ...]]:
    """The first, middle and last frame of each subject's first video of each case."""
    stills = {}
    for subject in range(len(results.subjects)):
        for case in range(len(results.cases)):
            trials = results.of(subject, case)
            if trials:
                path = folder / trial_name(subject, case, trials[0].round)
                with suppress(WanxError):
                    stills[subject, case] = _read(path, results.cases[case].frames)
    return stills


def read_frames(path: Path, numbers: Sequence[int], frames: int) -> NDArray[np.uint8]:
    """Frames of a trial's video of ``frames`` frames, by number from 0: ``[n, H, W, 3]``."""
    from wanx.runtime.inputs.image import read_image
    from wanx.runtime.inputs.video_input import open_video

    if frames == 1:
        return read_image(path.with_suffix(".png"))[None]
    video = open_video(path.with_suffix(".mp4"))
    return video.read(numbers, video.height, video.width)


def _read(path: Path, frames: int) -> tuple[Still, ...]:
    chosen = sorted({0, frames // 2, frames - 1})
    pixels = read_frames(path, chosen, frames)
    return tuple(Still(number=n + 1, pixels=p) for n, p in zip(chosen, pixels, strict=True))
