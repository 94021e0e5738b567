"""Say what a clip shows, from its pixels alone: shape, colour, direction and background.

Every answer can be "unknown". The rules know the palette and the three outlines, nothing of the
model: nearest palette colour within a limit, displacement of the centroid, and the overlap of the
object with templates of its own size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from data import BACKGROUNDS, COLOURS, SHAPES, Scene, coverage
from numpy.typing import NDArray

UNKNOWN = "unknown"
COLOUR_LIMIT = 50.0
PLAIN_SHARE = 0.97
AREA_LIMITS = (90.0, 900.0)
STRAY_LIMIT = 0.1
TOLERANCE = 0.15
MIN_TRAVEL = 7.0
MAX_DRIFT = 0.35
# A shape that lost a third of itself overlaps its nearest template by 0.77 at most; the closest two
# templates (circle, square) share 0.84; a squircle, halfway between them, is 0.028 nearer to one.
MIN_OVERLAP = 0.80
MIN_LEAD = 0.03
AGREEING_SHARE = 0.8

# Area of a shape of radius 1, and how far its centroid lies below its centre.
AREA = {"circle": math.pi, "square": 1.8**2, "triangle": 2.0}
SAG = {"circle": 0.0, "square": 0.0, "triangle": 1 / 3}


@dataclass(frozen=True)
class Sighting:
    """What was seen in a clip.

    ``overlap`` is the mean intersection over union with the best template, and ``frames`` is the
    number of frames in which one plausible object is present.
    """

    scene: Scene
    overlap: float
    frames: int
    complete: bool


def nearest(colour: NDArray[np.float64], palette: dict[str, tuple[int, int, int]]) -> str:
    """Name of the palette's nearest colour, if that is near enough."""
    distances = {name: float(np.linalg.norm(colour - value)) for name, value in palette.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= COLOUR_LIMIT else UNKNOWN


def soft_mask(
    frame: NDArray[np.float64], paper: NDArray[np.float64], ink: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Share of every pixel that is object: its place between the two colours, [H, W] in [0, 1].

    Both ends are cut off by ``TOLERANCE``, or a faint texture would add up to an area.
    """
    axis = ink - paper
    place = (frame - paper) @ axis / (axis @ axis)
    return np.asarray(np.clip((place - TOLERANCE) / (1 - 2 * TOLERANCE), 0.0, 1.0))


def centroid(mask: NDArray[np.float64]) -> tuple[float, float]:
    """Centre of mass (x, y) in pixels."""
    x, y = (mask.sum(axis) @ np.arange(mask.shape[1 - axis]) for axis in (0, 1))
    return float(x / mask.sum()), float(y / mask.sum())


def overlap(mask: NDArray[np.float64], shape: str) -> float:
    """Best soft intersection over union with templates of one shape around the object's size."""
    x, y = centroid(mask)
    best = 0.0
    for scale in (0.96, 1.0, 1.04):
        radius = scale * math.sqrt(mask.sum() / AREA[shape])
        template = coverage(shape, [(x, y - SAG[shape] * radius)], radius)[0]
        union = np.maximum(mask, template).sum()
        best = max(best, float(np.minimum(mask, template).sum() / union))
    return best


def outline(mask: NDArray[np.float64]) -> tuple[str, float]:
    """The shape whose template fits well and clearly better than the others, and how well."""
    scores = {shape: overlap(mask, shape) for shape in SHAPES}
    second, best = sorted(scores, key=scores.__getitem__)[-2:]
    clear = scores[best] >= MIN_OVERLAP and scores[best] - scores[second] >= MIN_LEAD
    return best if clear else UNKNOWN, scores[best]


def one_object(mask: NDArray[np.float64]) -> bool:
    """Whether the mask holds a single object of a plausible area, and hardly anything else."""
    area = mask.sum()
    if not AREA_LIMITS[0] <= area <= AREA_LIMITS[1]:
        return False
    x, y = centroid(mask)
    rows, columns = np.mgrid[0 : mask.shape[0], 0 : mask.shape[1]]
    # No template reaches farther than 0.95 √area, the top of the triangle, from its centroid.
    far = np.hypot(columns - x, rows - y) > 1.15 * math.sqrt(area)
    return bool(mask[far].sum() <= STRAY_LIMIT * area)


def common(names: list[str]) -> str:
    """The name that nearly all frames agree on."""
    name = max(set(names), key=names.count)
    return name if names.count(name) >= AGREEING_SHARE * len(names) else UNKNOWN


def moving(centres: list[tuple[float, float]]) -> str:
    """Direction of the displacement from the first centres to the last."""
    path = np.array(centres)
    dx, dy = path[-3:].mean(0) - path[:3].mean(0)
    along, across = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    if along < MIN_TRAVEL or across > MAX_DRIFT * along:
        return UNKNOWN
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


def detect(clip: NDArray[np.uint8]) -> Sighting:
    """Describe a clip [F, SIZE, SIZE, 3], uint8."""
    pixels = clip.astype(np.float64)
    border = np.concatenate([
        pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1],
    ], axis=1).reshape(-1, 3)  # fmt: skip
    paper = np.median(border, axis=0)
    plain = np.linalg.norm(border - paper, axis=1) < COLOUR_LIMIT
    background = nearest(paper, BACKGROUNDS) if plain.mean() >= PLAIN_SHARE else UNKNOWN
    colours, shapes, overlaps, centres = [], [], [], []
    for frame in pixels:
        contrast = np.linalg.norm(frame - paper, axis=2)
        core = contrast > 0.7 * np.quantile(contrast, 0.99)
        if not core.any():
            continue
        ink = np.median(frame[core], axis=0)
        if np.linalg.norm(ink - paper) < COLOUR_LIMIT:
            continue
        mask = soft_mask(frame, paper, ink)
        if not one_object(mask):
            continue
        shape, fit = outline(mask)
        colours.append(nearest(ink, COLOURS))
        shapes.append(shape)
        overlaps.append(fit)
        centres.append(centroid(mask))
    complete = len(centres) == len(pixels)
    if len(centres) < AGREEING_SHARE * len(pixels):
        return Sighting(Scene(UNKNOWN, UNKNOWN, UNKNOWN, background), 0.0, len(centres), False)
    scene = Scene(common(shapes), common(colours), moving(centres), background)
    return Sighting(scene, float(np.mean(overlaps)), len(centres), complete)
