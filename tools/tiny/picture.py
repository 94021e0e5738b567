"""Draw the README's picture: every fourth frame of four videos of the built-in model.

Run it as ``python tools/tiny/picture.py docs/tiny.png``.
"""

from __future__ import annotations

import sys

import numpy as np
from PIL import Image

import wanx

PROMPTS = (
    "a red circle moving right on a blue background",
    "a green square moving up on a white background",
    "a purple triangle moving left on a gray background",
    "a yellow square moving down on a black background",
)
SCALE = 2


def main(path: str) -> None:
    """Generate the videos and write the picture."""
    pipeline = wanx.load()
    rows = []
    for seed, prompt in enumerate(PROMPTS):
        frames = pipeline(prompt, seed=seed).frames
        assert frames is not None
        cells = [np.pad(f, ((2, 2), (2, 2), (0, 0)), constant_values=255) for f in frames[::4]]
        rows.append(np.concatenate(cells, axis=1))
    halves = [np.concatenate(rows[i : i + 2], axis=1) for i in (0, 2)]
    picture = Image.fromarray(np.concatenate(halves))
    size = (picture.width * SCALE, picture.height * SCALE)
    picture.resize(size, Image.Resampling.NEAREST).save(path, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
