"""The detector is right on every ground truth, and says "unknown" to everything else."""

import numpy as np
import pytest
from data import BACKGROUNDS, COLOURS, FRAMES, SIZE, Scene, all_scenes, coverage, render
from detector import UNKNOWN, detect, outline

CLIP = render(Scene("triangle", "yellow", "left", "gray"), 5)


@pytest.mark.parametrize("seed", range(2))
def test_ground_truth_of_all_combinations(seed):
    for index, scene in enumerate(all_scenes()):
        seen = detect(render(scene, 1000 * seed + index))
        assert (seen.scene, seen.complete) == (scene, True)
        assert seen.overlap > 0.97


def test_small_noise_does_not_confuse_it():
    noise = np.random.default_rng(0).normal(0, 6, CLIP.shape)
    noisy = np.clip(CLIP + noise, 0, 255).astype(np.uint8)
    assert detect(noisy).scene == Scene("triangle", "yellow", "left", "gray")


def test_pure_noise():
    clip = np.random.default_rng(0).integers(0, 256, CLIP.shape, dtype=np.uint8)
    assert detect(clip).scene == Scene(UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_blank_clip(background):
    clip = np.broadcast_to(np.array(BACKGROUNDS[background], np.uint8), CLIP.shape)
    seen = detect(clip)
    assert seen.scene == Scene(UNKNOWN, UNKNOWN, UNKNOWN, background)
    assert seen.frames == 0
    assert not seen.complete


def test_object_that_vanishes_halfway():
    clip = CLIP.copy()
    clip[FRAMES // 2 :] = BACKGROUNDS["gray"]
    seen = detect(clip)
    assert seen.frames == FRAMES // 2
    assert seen.scene == Scene(UNKNOWN, UNKNOWN, UNKNOWN, "gray")


def test_one_missing_frame_is_reported():
    clip = CLIP.copy()
    clip[9] = BACKGROUNDS["gray"]
    seen = detect(clip)
    assert seen.frames == FRAMES - 1
    assert not seen.complete


@pytest.mark.parametrize("shape", ["circle", "square", "triangle"])
@pytest.mark.parametrize("side", ["left", "top"])
def test_half_erased_shape_is_unknown(shape, side):
    clip = render(Scene(shape, "red", "down", "white"), 11)
    for frame in clip:
        contrast = np.abs(frame.astype(int) - BACKGROUNDS["white"]).sum(-1)
        rows, columns = np.nonzero(contrast > 100)
        if side == "left":
            frame[:, : int(np.median(columns))] = BACKGROUNDS["white"]
        else:
            frame[: int(np.median(rows))] = BACKGROUNDS["white"]
    # The upper half of a triangle is a triangle again; its lower half is not.
    assert detect(clip).scene.shape == UNKNOWN


@pytest.mark.parametrize("radius", [9.5, 13.0])
@pytest.mark.parametrize("name", ["ellipse", "bar", "ring", "cross", "squircle"])
def test_other_shapes_are_unknown(name, radius):
    y, x = np.mgrid[0:SIZE, 0:SIZE] - 31.4
    distance = {
        "ellipse": np.hypot(x / 1.4, y * 1.4) - radius,
        "bar": np.maximum(np.abs(x) / 1.4, np.abs(y) * 1.4) - 0.9 * radius,
        "ring": np.abs(np.hypot(x, y) - 0.75 * radius) - 0.25 * radius,
        "cross": np.maximum(
            np.minimum(np.abs(x), np.abs(y)) - 0.33 * radius,
            np.maximum(np.abs(x), np.abs(y)) - radius,
        ),
        "squircle": (x**4 + y**4) ** 0.25 - 0.95 * radius,
    }[name]
    assert outline(np.clip(0.5 - distance, 0, 1))[0] == UNKNOWN


@pytest.mark.parametrize("shape", ["circle", "square", "triangle"])
@pytest.mark.parametrize("radius", [9.0, 11.3, 14.0])
def test_shape_without_its_upper_third_is_unknown(shape, radius):
    mask = coverage(shape, [(31.3, 31.6)], radius)[0].astype(float)
    mask[np.cumsum(mask.sum(1)) < mask.sum() / 3] = 0
    assert outline(mask)[0] == UNKNOWN


def test_two_objects_are_unknown():
    other = render(Scene("circle", "yellow", "left", "gray"), 35)
    both = np.where(np.abs(CLIP.astype(int) - 125).sum(-1, keepdims=True) > 60, CLIP, other)
    assert detect(both).scene.shape == UNKNOWN


def test_still_object_has_no_direction():
    clip = np.repeat(CLIP[:1], FRAMES, axis=0)
    assert detect(clip).scene == Scene("triangle", "yellow", UNKNOWN, "gray")


def test_diagonal_motion_has_no_direction():
    clip = np.stack([np.roll(CLIP[0], (i, i), axis=(0, 1)) for i in range(FRAMES)])
    clip[:, :, :1] = clip[:, :1] = BACKGROUNDS["gray"]
    assert detect(clip).scene.direction == UNKNOWN


def test_foreign_colours_are_unknown():
    cyan = np.where(np.equal(CLIP, COLOURS["yellow"]).all(-1)[..., None], (0, 220, 220), CLIP)
    assert detect(cyan.astype(np.uint8)).scene.colour == UNKNOWN
    pink = np.where(np.equal(CLIP, BACKGROUNDS["gray"]).all(-1)[..., None], (255, 150, 200), CLIP)
    assert detect(pink.astype(np.uint8)).scene.background == UNKNOWN


def test_patchy_background_is_unknown():
    clip = CLIP.copy()
    clip[:, :, SIZE - 6 :] = (240, 240, 240)
    assert detect(clip).scene.background == UNKNOWN
