"""Let the tiny model draw scenes, and count what the detector recognises.

    python tools/tiny/evaluate.py CHECKPOINT [--split held-out] [--seeds 2] [--sheet FILE.png]

Sampling as the runtime does it: 20 UniPC steps, shift 3, guidance 2.5, 512 context tokens, fp32.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from checkpoint import read
from data import Scene, split_scenes
from detector import Sighting, detect
from numpy.typing import NDArray
from PIL import Image
from sampling import GUIDE_SCALE, sample

BATCH = 8
FIELDS = ("colour", "background", "direction", "shape")
SHEET_FRAMES = (0, 2, 4, 6, 8, 10, 12, 14, 16)


def score(pairs: list[tuple[Scene, Sighting]]) -> dict[str, float]:
    """Percentages right, of complete clips, and the mean overlap with the recognised outline."""
    table = {
        field: 100 * float(np.mean([
            getattr(wanted, field) == getattr(seen.scene, field) for wanted, seen in pairs
        ]))
        for field in FIELDS
    }  # fmt: skip
    table["object in every frame"] = 100 * float(np.mean([seen.complete for _, seen in pairs]))
    table["overlap"] = 100 * float(np.mean([seen.overlap for _, seen in pairs]))
    return table


def contact_sheet(clips: list[NDArray[np.uint8]]) -> Image.Image:
    """One row per clip, every other frame."""
    rows = []
    for clip in clips:
        cells = [
            np.pad(clip[frame], ((0, 1), (0, 1), (0, 0)), constant_values=255)
            for frame in SHEET_FRAMES
        ]
        rows.append(np.concatenate(cells, axis=1))
    return Image.fromarray(np.concatenate(rows))


def main() -> None:
    """Sample, detect, print the table and every miss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--split", choices=("held-out", "train"), default="held-out")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--guide-scale", type=float, default=GUIDE_SCALE)
    parser.add_argument("--sheet", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, vae = read(arguments.checkpoint)
    scenes = split_scenes()[arguments.split == "held-out"][: arguments.limit]
    jobs = [(scene, seed) for seed in range(arguments.seeds) for scene in scenes]
    clips: list[NDArray[np.uint8]] = []
    for start in range(0, len(jobs), BATCH):
        part = jobs[start : start + BATCH]
        prompts, seeds = [scene.caption for scene, _ in part], [seed for _, seed in part]
        clips.extend(sample(model, vae, prompts, seeds, arguments.guide_scale))
    pairs = [(scene, detect(clip)) for (scene, _), clip in zip(jobs, clips, strict=True)]
    for (wanted, seed), (_, seen) in zip(jobs, pairs, strict=True):
        if wanted != seen.scene or not seen.complete:
            print(f"seed {seed}: wanted {wanted}, saw {seen}")
    print(json.dumps({"clips": len(pairs), **score(pairs)}))
    if arguments.sheet:
        contact_sheet(clips[:48]).save(arguments.sheet)


if __name__ == "__main__":
    main()
