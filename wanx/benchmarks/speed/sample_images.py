"""Images for benchmarks of tasks that start from images: made up, the same for everybody."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wanx.config.models import Task
from wanx.runtime.options import RunOptions

Pixels = NDArray[np.uint8]


def with_sample_images(options: RunOptions, task: Task, width: int, height: int) -> RunOptions:
    """Options with the images that a task needs and that are not given."""
    first, last = sample_image(width, height), sample_image(width, height)[:, ::-1]
    if task in ("i2v", "flf2v") and options.image is None:
        options = replace(options, image=first)
    if task == "flf2v" and options.last_image is None:
        options = replace(options, last_image=np.ascontiguousarray(last))
    if task == "vace" and options.video is None and not options.references:
        options = replace(options, references=(first,))
    return options


def sample_image(width: int, height: int) -> Pixels:
    """A disk on a gradient, ``[H, W, 3]``: smooth areas, an edge and every grey."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    red, green = 255 * x / max(1, width - 1), 255 * y / max(1, height - 1)
    side = min(width, height)
    disk = np.hypot(x - width / 3, y - height / 2) < side / 4
    pixels = np.stack([red, green, np.full_like(red, 96)], axis=-1)
    pixels[disk] = (240, 60, 40)
    return pixels.astype(np.uint8)


def as_json(options: RunOptions, folder: Path, name: str) -> dict[str, Any]:
    """Options as JSON has them; pixels become files in ``folder`` that start with ``name``."""
    from PIL import Image

    facts = asdict(options)

    def stored(field: str, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            path = folder / f"{name}-{field}.png"
            Image.fromarray(value).save(path)
            return str(path)
        return None if value is None else str(Path(value).resolve())

    for field in ("image", "last_image", "video", "mask"):
        facts[field] = stored(field, facts[field])
    facts["references"] = [
        stored(f"reference{i}", item) for i, item in enumerate(options.references)
    ]
    return facts
