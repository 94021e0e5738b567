"""The little world of the tiny model: one coloured shape moving over a plain background.

A clip is described by four words (shape, colour, direction, background) and drawn from an integer
seed, so a data set is a list of (scene, seed) pairs and never has to be stored.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIZE = 64
FRAMES = 17

SHAPES = ("circle", "square", "triangle")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 180, 70),
    "blue": (40, 70, 220),
    "yellow": (245, 215, 50),
    "purple": (160, 50, 190),
    "orange": (245, 130, 30),
}
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (15, 15, 15),
    "white": (240, 240, 240),
    "gray": (125, 125, 125),
    "blue": COLOURS["blue"],
}

HELD_OUT = 41
RADIUS = (9.0, 14.0)
TRAVEL = (14.0, 26.0)
MARGIN = 1.0


@dataclass(frozen=True)
class Scene:
    """What a clip shows, in the words of its caption."""

    shape: str
    colour: str
    direction: str
    background: str

    @property
    def caption(self) -> str:
        """The prompt that describes the scene."""
        return (
            f"a {self.colour} {self.shape} moving {self.direction} "
            f"on a {self.background} background"
        )


def all_scenes() -> list[Scene]:
    """The 276 combinations in which the shape differs from its background."""
    return [
        Scene(*words)
        for words in itertools.product(SHAPES, COLOURS, DIRECTIONS, BACKGROUNDS)
        if words[1] != words[3]
    ]


def split_scenes() -> tuple[list[Scene], list[Scene]]:
    """Scenes to train on, and the 41 that no training clip ever shows."""
    scenes = all_scenes()
    random.Random(0).shuffle(scenes)
    return scenes[HELD_OUT:], scenes[:HELD_OUT]


def signed_distance(
    shape: str, x: NDArray[np.float32], y: NDArray[np.float32], radius: float
) -> NDArray[np.float32]:
    """Distance in pixels from the outline, negative inside; y points down.

    Circle, square and upright triangle of one ``radius`` have the same width of ``2 * radius``,
    except that the square is narrower (0.9) so that its corners do not make it look larger.
    """
    if shape == "circle":
        return np.asarray(np.hypot(x, y) - radius, np.float32)
    if shape == "square":
        return np.asarray(np.maximum(np.abs(x), np.abs(y)) - 0.9 * radius, np.float32)
    base = y - radius
    sides = (2 * np.abs(x) - (y + radius)) / np.sqrt(5.0)
    return np.asarray(np.maximum(base, sides), np.float32)


def coverage(shape: str, centres: list[tuple[float, float]], radius: float) -> NDArray[np.float32]:
    """Share of every pixel that the shape covers: [frames, SIZE, SIZE], float32 in [0, 1]."""
    pixels = np.arange(SIZE, dtype=np.float32)
    centre = np.array(centres, dtype=np.float32)
    x = pixels[None, None, :] - centre[:, 0, None, None]
    y = pixels[None, :, None] - centre[:, 1, None, None]
    distance = signed_distance(shape, x, y, radius)
    return np.asarray(np.clip(0.5 - distance, 0.0, 1.0), np.float32)


def trajectory(direction: str, seed: int) -> tuple[float, list[tuple[float, float]]]:
    """Radius of a shape and its centre (x, y) in every frame; it never touches the border."""
    generator = np.random.default_rng(seed)
    radius = float(generator.uniform(*RADIUS))
    low, high = radius + MARGIN, SIZE - 1 - radius - MARGIN
    travel = min(float(generator.uniform(*TRAVEL)), high - low)
    middle = float(generator.uniform(low + travel / 2, high - travel / 2))
    across = float(generator.uniform(low, high))
    dx, dy = DIRECTIONS[direction]
    centres = []
    for frame in range(FRAMES):
        along = travel * (frame / (FRAMES - 1) - 0.5)
        centres.append((middle + dx * along, across) if dx else (across, middle + dy * along))
    return radius, centres


def render(scene: Scene, seed: int) -> NDArray[np.uint8]:
    """Draw a clip: [FRAMES, SIZE, SIZE, 3], uint8; the same scene and seed give the same bytes."""
    radius, centres = trajectory(scene.direction, seed)
    ink = np.array(COLOURS[scene.colour], dtype=np.float32)
    paper = np.array(BACKGROUNDS[scene.background], dtype=np.float32)
    covered = coverage(scene.shape, centres, radius)[..., None]
    return (paper + covered * (ink - paper) + 0.5).astype(np.uint8)


def dataset(scenes: list[Scene], clips: int, seed: int) -> list[tuple[Scene, int]]:
    """Pairs for ``render``: every scene equally often, each time with another seed."""
    return [(scenes[i % len(scenes)], seed * 1_000_003 + i) for i in range(clips)]


def as_input(clip: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Frames as the VAE takes them: [3, FRAMES, SIZE, SIZE], float32 in [-1, 1]."""
    return np.ascontiguousarray(clip.transpose(3, 0, 1, 2), dtype=np.float32) / 127.5 - 1.0
