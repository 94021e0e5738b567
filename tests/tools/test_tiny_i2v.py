"""The built-in image-to-video model goes on from its image, in the direction asked for."""

from __future__ import annotations

import numpy as np
import pytest
from data import Scene, render, split_scenes
from detector import Sighting, detect
from numpy.typing import NDArray

import wanx
from wanx.builtin import builtin_bundle
from wanx.bundle.reader import read_bundle

CLIPS, SEED = 24, 2000
Pixels = NDArray[np.uint8]


@pytest.fixture(scope="module")
def clips() -> list[tuple[Scene, Pixels, Pixels]]:
    """Scenes that training never showed, the image that each starts from, and the video."""
    pipeline = wanx.load("tiny-i2v", threads=2)
    made = []
    for number, scene in enumerate(split_scenes()[1][:CLIPS]):
        image = render(scene, SEED + number)[0]
        frames = pipeline(scene.caption, image=image, seed=SEED + number).frames
        assert frames is not None
        made.append((scene, image, frames))
    return made


@pytest.fixture(scope="module")
def sightings(clips: list[tuple[Scene, Pixels, Pixels]]) -> list[tuple[Scene, Sighting]]:
    return [(scene, detect(frames)) for scene, _, frames in clips]


def test_it_continues_the_image(clips: list[tuple[Scene, Pixels, Pixels]]) -> None:
    decibels = []
    for _, image, frames in clips:
        error = np.square(image.astype(np.float64) - frames[0]).mean()
        decibels.append(10 * np.log10(255**2 / error))
    assert np.mean(decibels) >= 25, decibels
    assert min(decibels) >= 20, decibels


def test_it_moves_as_the_prompt_says(sightings: list[tuple[Scene, Sighting]]) -> None:
    right = [wanted.direction == seen.scene.direction for wanted, seen in sightings]
    assert np.mean(right) >= 0.8


def test_it_keeps_colours_and_the_object(sightings: list[tuple[Scene, Sighting]]) -> None:
    for field in ("colour", "background"):
        same = [getattr(wanted, field) == getattr(seen.scene, field) for wanted, seen in sightings]
        assert np.mean(same) >= 0.95, field
    assert sum(not seen.complete for _, seen in sightings) <= 1


def test_it_is_small() -> None:
    bundle = read_bundle(builtin_bundle("tiny-i2v"))
    assert bundle.manifest.precision == "bf16"
    assert bundle.size_bytes <= 15_000_000
