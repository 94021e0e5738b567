"""Broken output is caught, and real scenes, however dark or quiet, are not."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from diffusers.video_processor import VideoProcessor
from numpy.typing import NDArray

from wanx.errors import WanxError
from wanx.runtime.output.frame_checks import FrameCheck, frames_to_uint8

RNG = np.random.default_rng(0)


def judge(*batches: NDArray[np.uint8]) -> None:
    check = FrameCheck()
    for batch in batches:
        check.update(batch)
    check.finish()


def pixels(*shape: int, low: int = 0, high: int = 256) -> NDArray[np.uint8]:
    return RNG.integers(low, high, (*shape, 3), dtype=np.uint8)


@pytest.mark.parametrize("layout", ["channels last", "channels first"])
def test_conversion_equals_diffusers(layout: str) -> None:
    frames = RNG.normal(0, 0.7, (3, 5, 16, 24)).astype(np.float32)
    video = VideoProcessor().postprocess_video(torch.from_numpy(frames)[None], output_type="pil")
    expected = np.stack([np.array(image) for image in video[0]])
    given = frames if layout == "channels first" else np.moveaxis(frames, 0, -1)
    converted = frames_to_uint8(given)
    assert converted.dtype == np.uint8
    assert converted.flags.c_contiguous
    assert np.array_equal(converted, expected)


def test_conversion_rounds_to_nearest_and_clamps() -> None:
    wanted = np.arange(256)
    levels = (wanted / 127.5 - 1).astype(np.float32)
    for offset in (-0.49, 0, 0.49):
        values = np.repeat((levels + np.float32(offset / 127.5))[:, None], 3, axis=1)
        assert np.array_equal(frames_to_uint8(values[None, None])[0, 0, :, 0], wanted)
    assert frames_to_uint8(np.full((1, 1, 1, 3), 7.0, np.float32)).item(0) == 255
    assert frames_to_uint8(np.full((1, 1, 1, 3), -7.0, np.float32)).item(0) == 0


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("value", "name"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")]
)
@pytest.mark.parametrize("frame", [0, 3])
@pytest.mark.fault("frames that are not finite")
def test_one_bad_value_names_its_frame(axis: int, value: float, name: str, frame: int) -> None:
    decoded = np.zeros((4, 8, 8, 3) if axis == 0 else (3, 4, 8, 8), np.float32)
    bad = decoded.copy()
    np.moveaxis(bad, axis, 0)[frame, 1, 2, 0] = value
    with pytest.raises(WanxError, match=f"the VAE produced {name} at frame {4 + frame};"):
        FrameCheck.convert(bad, 4)


@pytest.mark.parametrize(
    ("batches", "found"),
    [
        ([pixels(5, 16, 16, low=0, high=3)], "black: the brightest pixel is 2 of 255"),
        ([np.zeros((1, 16, 16, 3), np.uint8)], "black: the brightest pixel is 0"),
        ([np.full((5, 16, 16, 3), (200, 30, 90), np.uint8)], "one flat colour: its deviation is 0"),
        ([np.full((1, 16, 16, 3), 255, np.uint8)], "one flat colour"),
        ([np.broadcast_to(pixels(16, 16), (5, 16, 16, 3))], "frozen: all 5 frames are identical"),
        ([], "no frames"),
    ],
)
@pytest.mark.fault("frames that are not finite")
def test_failures(batches: list[NDArray[np.uint8]], found: str) -> None:
    with pytest.raises(WanxError, match=re.escape(found)) as caught:
        judge(*batches)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)


def test_flat_means_below_half_a_level_in_every_channel() -> None:
    nearly = np.full((4, 16, 16, 3), 90, np.uint8)
    nearly[0, 0, :8] += 1
    with pytest.raises(WanxError, match="flat"):
        judge(nearly)
    nearly[:, :, ::2, 1] += 1
    expected = nearly.reshape(-1, 3).std(axis=0).max()
    assert expected >= 0.5
    judge(nearly)


def test_real_scenes_pass() -> None:
    judge(pixels(5, 16, 16))
    judge(pixels(1, 16, 16))
    judge(pixels(5, 16, 16, low=0, high=5))
    night = np.zeros((9, 64, 64, 3), np.uint8)
    for i, frame in enumerate(night):
        frame[30, 20 + i] = 9
        frame[::7, ::5] = 1
        frame[::3, ::4] += 2
    judge(night)
    fade = np.zeros((9, 16, 16, 3), np.uint8) + np.arange(9, dtype=np.uint8)[:, None, None, None]
    judge(fade)


@pytest.mark.parametrize("split", range(1, 8))
@pytest.mark.parametrize("moving", range(1, 8))
def test_movement_is_seen_across_batches(split: int, moving: int) -> None:
    still = np.broadcast_to(pixels(16, 16), (8, 16, 16, 3)).copy()
    with pytest.raises(WanxError, match="frozen: all 8"):
        judge(still[:split], still[split:])
    still[moving:, 3, 4, 1] ^= 1
    judge(still[:split], still[split:])


def test_sums_do_not_overflow() -> None:
    bright = np.full((3, 512, 512, 3), 255, np.uint8)
    with pytest.raises(WanxError, match="flat"):
        judge(bright)
    bright[1] = 250
    judge(bright)
