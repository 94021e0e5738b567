"""Encode what an image-to-video run is given, for every training clip, once.

    python tools/tiny/conditions.py WORK

Reads ``vae.pt`` and ``latents.pt`` from WORK; leaves ``conditions.pt``: tokens [N, 80, 64] of the
first frame with nothing after it (float32, normalised like the latents), and that frame
[N, 3, 64, 64] in uint8.
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path

import numpy as np
import torch
from data import as_input, dataset, render, split_scenes
from latents import BATCH, CLIPS, gather, load_vae, tokens_of
from parallel import WORKERS, launch
from train_vae import distribution


@torch.no_grad()
def encode(work: Path, rank: int) -> None:
    """Encode this process's share of the clips; the first process saves all."""
    vae = load_vae(work)
    encoded = torch.load(work / "latents.pt", weights_only=True)
    mean, std = (encoded[name].view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    share = dataset(split_scenes()[0], CLIPS, seed=1)[rank::WORKERS]
    tokens, frames = [], []
    began = time.monotonic()
    for start in range(0, len(share), BATCH):
        clips = np.stack([render(scene, seed) for scene, seed in share[start : start + BATCH]])
        first = torch.from_numpy(clips[:, 0]).permute(0, 3, 1, 2).contiguous()
        video = torch.from_numpy(np.stack([as_input(clip) for clip in clips]))
        video[:, :, 1:] = 0
        tokens.append(tokens_of((distribution(vae, video)[0] - mean) / std))
        frames.append(first)
        if start % 500 == 0 and rank == 0:
            print(f"{start} of {len(share)} clips, {time.monotonic() - began:.0f} s", flush=True)
    conditions = {"tokens": gather(torch.cat(tokens)), "frames": gather(torch.cat(frames))}
    if rank == 0:
        torch.save(conditions, work / "conditions.pt")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    launch(functools.partial(encode, parser.parse_args().work))
