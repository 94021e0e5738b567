"""Images fit to sizes as PyTorch and Pillow would make them."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import interpolate

import wanx.runtime.inputs.resize as resize_module
from wanx.config.models import CLIP_MEAN, CLIP_STD
from wanx.runtime.inputs.resize import (
    clip_pixels,
    cover,
    letterbox,
    resize_bicubic,
    resize_bilinear,
)

RNG = np.random.default_rng(0)
RESIZE = {"bicubic": resize_bicubic, "bilinear": resize_bilinear}

# Odd and even, up and down, one axis up and the other down, sides of one pixel, a photograph.
SIZES = [
    ((37, 53), (224, 224)),
    ((480, 832), (464, 832)),
    ((53, 37), (11, 7)),
    ((37, 53), (101, 5)),
    ((53, 37), (5, 101)),
    ((64, 64), (128, 128)),
    ((64, 64), (32, 32)),
    ((1, 1), (5, 7)),
    ((1, 9), (3, 224)),
    ((9, 1), (224, 3)),
    ((2, 3), (17, 19)),
    ((37, 53), (1, 1)),
    ((5, 4000), (40, 31)),
    ((1501, 2003), (480, 832)),
]


def noise(*shape: int) -> NDArray[np.float32]:
    """Neighbours as different as they can be: a position that is off by little shows."""
    return RNG.uniform(-1, 1, shape).astype(np.float32)


def smooth(height: int, width: int) -> NDArray[np.uint8]:
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 7), np.cos(y / 5 + x / 11), np.sin(y / 9) * np.cos(x / 6)]
    return (np.stack(waves, axis=-1) * 100 + 128).astype(np.uint8)


def by_torch(image: NDArray[np.float32], height: int, width: int, mode: str) -> NDArray[Any]:
    batch = torch.from_numpy(image)[None]
    done = interpolate(batch, (height, width), mode=mode, align_corners=False)
    return np.asarray(done[0].numpy())


@pytest.mark.parametrize("mode", RESIZE)
@pytest.mark.parametrize(("old", "new"), SIZES)
def test_resize_equals_torch(old: tuple[int, int], new: tuple[int, int], mode: str) -> None:
    image = noise(3, *old)
    before = image.copy()
    resized = RESIZE[mode](image, *new)
    assert resized.dtype == np.float32
    assert resized.shape == (3, *new)
    assert np.abs(resized - by_torch(image, *new, mode)).max() < 1e-5
    assert np.array_equal(image, before)


@pytest.mark.parametrize("mode", RESIZE)
def test_same_size_changes_nothing(mode: str) -> None:
    image = noise(3, 37, 53)
    resized = RESIZE[mode](image, 37, 53)
    assert np.array_equal(resized, image)
    assert not np.shares_memory(resized, image)


def test_frames_are_resized_one_by_one() -> None:
    frames = noise(3, 2, 20, 30)
    resized = resize_bicubic(frames, 11, 17)
    for index in range(2):
        assert np.array_equal(resized[:, index], resize_bicubic(frames[:, index], 11, 17))


def test_bicubic_overshoots_and_bilinear_does_not() -> None:
    step = np.where(np.arange(20) < 10, -1, 1).astype(np.float32)
    image = np.broadcast_to(step, (3, 20, 20))
    assert resize_bicubic(image, 50, 50).max() > 1.05
    assert resize_bilinear(image, 50, 50).max() <= 1


@pytest.mark.parametrize("mode", RESIZE)
def test_shrinking_needs_little_memory(mode: str) -> None:
    image = noise(3, 1500, 2000)
    tracemalloc.start()
    RESIZE[mode](image, 240, 416)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < image.nbytes / 2


def by_pillow(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    rows, columns = pixels.shape[:2]
    scale = max(width / columns, height / rows)
    size = round(columns * scale), round(rows * scale)
    scaled = np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    top, left = (size[1] - height) // 2, (size[0] - width) // 2
    return scaled[top : top + height, left : left + width]


@pytest.mark.parametrize(
    ("old", "new"),
    [*SIZES, ((480, 832), (832, 480)), ((1, 3000), (7, 5)), ((999, 3), (8, 8)), ((49, 49), (7, 7))],
)
def test_cover_equals_pillow(old: tuple[int, int], new: tuple[int, int]) -> None:
    pixels = RNG.integers(0, 256, (*old, 3), dtype=np.uint8)
    before = pixels.copy()
    covered = cover(pixels, *new)
    assert covered.dtype == np.uint8
    assert covered.shape == (*new, 3)
    assert np.array_equal(covered, by_pillow(pixels, *new))
    assert np.array_equal(pixels, before)


def test_cover_always_covers() -> None:
    """Whatever the aspect and however its division is rounded."""
    for _ in range(500):
        height, width, *new = RNG.integers(1, 60, 4).tolist()
        pixels = np.full((height, width, 3), 77, np.uint8)
        covered = cover(pixels, *new)
        assert covered.shape == (*new, 3)
        assert (covered == 77).all()


def test_cover_of_the_same_size_is_the_image() -> None:
    pixels = RNG.integers(0, 256, (37, 53, 3), dtype=np.uint8)
    assert np.array_equal(cover(pixels, 37, 53), pixels)


@pytest.mark.parametrize("turned", [False, True])
def test_cover_of_a_line(turned: bool) -> None:
    """Scaled as a whole this would have 13 billion pixels; its middle decides alone."""
    line = smooth(1, 60000)
    middle = line[:, 29980:30020]
    if turned:
        covered = cover(line.swapaxes(0, 1).copy(), 832, 464).swapaxes(0, 1)
        expected = by_pillow(middle.swapaxes(0, 1).copy(), 832, 464).swapaxes(0, 1)
    else:
        covered, expected = cover(line, 464, 832), by_pillow(middle, 464, 832)
    assert covered.shape == (464, 832, 3)
    assert expected.std() > 3
    assert np.abs(covered.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_cover_in_part_equals_cover_as_a_whole(
    old: tuple[int, int], new: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = smooth(*old)
    whole = cover(pixels, *new).astype(int)
    monkeypatch.setattr(resize_module, "MAX_PIXELS", 0)
    assert np.abs(cover(pixels, *new) - whole).max() <= 1


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_letterbox(old: tuple[int, int], new: tuple[int, int]) -> None:
    image = noise(3, *old)
    scale = min(new[0] / old[0], new[1] / old[1])
    height, width = max(1, int(old[0] * scale)), max(1, int(old[1] * scale))
    top, left = (new[0] - height) // 2, (new[1] - width) // 2
    expected = torch.ones(3, *new)
    inside = torch.from_numpy(by_torch(image, height, width, "bilinear"))
    expected[:, top : top + height, left : left + width] = inside
    boxed = letterbox(image, *new)
    assert boxed.dtype == np.float32
    assert boxed.shape == (3, *new)
    assert np.abs(boxed - expected.numpy()).max() < 1e-5


def test_letterbox_by_hand() -> None:
    """A square in a wide canvas: white columns at both sides, the odd one on the right."""
    boxed = letterbox(np.full((3, 4, 4), -1, np.float32), 8, 13)
    assert (boxed[..., 2:10] == -1).all()
    assert (boxed[..., :2] == 1).all()
    assert (boxed[..., 10:] == 1).all()


def test_letterbox_of_the_same_size_is_the_image() -> None:
    image = noise(3, 37, 53)
    assert np.array_equal(letterbox(image, 37, 53), image)


@pytest.mark.parametrize("shape", [(480, 832), (832, 480), (100, 100), (1, 1), (33, 1201)])
def test_clip_pixels(shape: tuple[int, int]) -> None:
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    image = noise(3, *shape)
    squashed = torch.from_numpy(by_torch(image, 224, 224, "bicubic"))
    expected = squashed.mul(0.5).add(0.5).sub(mean).div(std)
    pixels = clip_pixels(image)
    assert pixels.dtype == np.float32
    assert pixels.shape == (3, 224, 224)
    assert np.abs(pixels - expected.numpy()).max() < 2e-5


def test_clip_constants_are_those_of_transformers() -> None:
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    assert list(CLIP_MEAN) == list(OPENAI_CLIP_MEAN)
    assert list(CLIP_STD) == list(OPENAI_CLIP_STD)


def test_clip_pixels_of_another_size() -> None:
    assert clip_pixels(noise(3, 50, 70), size=32).shape == (3, 32, 32)
