"""Which task takes which images and videos, and what becomes of the size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wanx.config.models import PRESETS, Task
from wanx.errors import CorruptInputError, UsageError
from wanx.runtime.inputs.reading import read_inputs
from wanx.runtime.options import ResolvedRun, RunOptions
from wanx.runtime.output.video import VideoWriter
from wanx.runtime.resolve import resolve

PICTURE = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)


def write_video(path: Path, frames: int, width: int = 64, height: int = 48) -> Path:
    pixels = np.random.default_rng(1).integers(0, 255, (frames, height, width, 3), dtype=np.uint8)
    with VideoWriter(path, width, height, metadata={}) as writer:
        writer.write(pixels)
    return path


def resolved(preset: str, **options: Any) -> ResolvedRun:
    config = PRESETS[preset]
    asked = RunOptions(prompt="a", **options)
    return resolve(asked, config, read_inputs(asked, config.task))


@pytest.mark.parametrize(
    ("task", "given", "words"),
    [
        ("t2v", {"image": PICTURE}, "t2v takes no --image, it takes a prompt only"),
        ("i2v", {}, "needs --image"),
        (
            "i2v",
            {"image": PICTURE, "last_image": PICTURE},
            "takes no --last-image, it takes --image",
        ),
        ("i2v", {"image": PICTURE, "vace_scale": 1.0}, "takes no --vace-scale"),
        ("flf2v", {"image": PICTURE}, "needs --last-image"),
        ("flf2v", {"last_image": PICTURE}, "needs --image"),
        ("vace", {"image": PICTURE}, "--video, --mask, --reference, --vace-scale"),
        ("vace", {"mask": "m.mp4"}, "give --video too"),
        ("t2v", {"references": (PICTURE,)}, "takes no --reference"),
    ],
)
def test_what_a_task_does_not_take(task: Task, given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_inputs(RunOptions(**given), task)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "pixels",
    [
        PICTURE.astype(np.float32),
        PICTURE[..., 0],
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_arrays_that_are_no_images(pixels: Any) -> None:
    with pytest.raises(UsageError, match="uint8"):
        read_inputs(RunOptions(image=pixels), "i2v")


def test_files_and_arrays_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    Image.fromarray(PICTURE).save(path)
    for picture in (path, str(path), PICTURE):
        options = RunOptions(image=picture, last_image=picture)
        inputs = read_inputs(options, "flf2v")
        assert np.array_equal(inputs.image, PICTURE)
        assert np.array_equal(inputs.last_image, PICTURE)
    assert resolved("i2v-14B", image=path).image == "p.png"
    assert resolved("i2v-14B", image=PICTURE).image == "pixels"


def test_damaged_inputs_are_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    with pytest.raises(CorruptInputError, match=r"broken\.png"):
        read_inputs(RunOptions(references=(path,)), "vace")
    with pytest.raises(UsageError, match=r"nothing\.mp4"):
        read_inputs(RunOptions(video=tmp_path / "nothing.mp4"), "vace")


def test_a_mask_has_as_many_frames_as_its_video(tmp_path: Path) -> None:
    video, mask = write_video(tmp_path / "v.mp4", 9), write_video(tmp_path / "m.mp4", 8)
    with pytest.raises(UsageError, match=r"8 frames and .* has 9"):
        read_inputs(RunOptions(video=video, mask=mask), "vace")


def test_an_image_sets_the_shape_and_the_size_its_area() -> None:
    """The figure of wan21.md: an image of 832x480 becomes 832x464 at 480P."""
    image = np.zeros((480, 832, 3), np.uint8)
    run = resolved("i2v-14B", image=image, width=832, height=480)
    assert (run.width, run.height, run.frames) == (832, 464, 81)
    tall = resolved("i2v-14B", image=np.zeros((300, 100, 3), np.uint8), width=832, height=480)
    assert tall.height / tall.width == pytest.approx(3, rel=0.05)
    assert tall.height * tall.width == pytest.approx(832 * 480, rel=0.05)


def test_one_frame_is_not_both_first_and_last() -> None:
    with pytest.raises(UsageError, match="5 frames or more"):
        resolved("flf2v-14B", image=PICTURE, last_image=PICTURE, frames=1)


def test_a_control_video_sets_shape_and_frames(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", 30, 96, 64)
    run = resolved("vace-1.3B", video=video)
    assert (run.width, run.height, run.frames) == (96, 64, 29)
    assert run.vace_scale == 1
    assert resolved("vace-1.3B", video=video, frames=9).frames == 9
    small = resolved("vace-1.3B", video=video, width=48, height=32)
    assert small.width * small.height <= 48 * 32
    assert resolved("vace-1.3B", frames=5).frames == 5
    with pytest.raises(UsageError, match="vace scale"):
        resolved("vace-1.3B", vace_scale=float("nan"))


def test_other_tasks_have_no_scale() -> None:
    assert resolved("t2v-1.3B").vace_scale is None
    assert resolved("t2v-1.3B").references is None
