"""Encode the training clips once, and measure the statistics that normalise their latents.

    python tools/tiny/latents.py WORK

Reads ``vae.pt`` from WORK; leaves ``latents.pt``: tokens [N, 80, 64] (float32, normalised), the
scene of each clip [N], and the mean and standard deviation of the 16 latent channels.
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path

import numpy as np
import torch
from data import as_input, dataset, render, split_scenes
from parallel import WORKERS, launch
from torch import Tensor, distributed
from train_vae import distribution, training_config

from wanx.models.vae import WanVAE

CLIPS = 4230
BATCH = 10


def load_vae(work: Path) -> WanVAE:
    """The trained VAE, giving raw latents."""
    vae = WanVAE(training_config())
    vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True)["vae"])
    return vae.eval()


def tokens_of(latents: Tensor) -> Tensor:
    """Patches of latents [B, 16, T, h, w] as [B, L, 64], features ordered (c, ph, pw)."""
    batch, channels, frames, height, width = latents.shape
    patches = latents.reshape(batch, channels, frames, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 3, 5, 1, 4, 6).reshape(batch, -1, channels * 4)


@torch.no_grad()
def encode(work: Path, rank: int) -> None:
    """Encode this process's share of the clips; the first process normalises and saves all."""
    vae = load_vae(work)
    scenes, _ = split_scenes()
    pairs = dataset(scenes, CLIPS, seed=1)
    share = pairs[rank::WORKERS]
    means, variances = [], []
    began = time.monotonic()
    for start in range(0, len(share), BATCH):
        clips = [as_input(render(scene, seed)) for scene, seed in share[start : start + BATCH]]
        mean, log_variance = distribution(vae, torch.from_numpy(np.stack(clips)))
        means.append(mean)
        variances.append(log_variance.exp())
        if start % 500 == 0 and rank == 0:
            print(f"{start} of {len(share)} clips, {time.monotonic() - began:.0f} s", flush=True)
    latents, variance = gather(torch.cat(means)), gather(torch.cat(variances))
    if rank:
        return
    axes, shape = (0, 2, 3, 4), (1, -1, 1, 1, 1)
    mean = latents.mean(axes)
    # The posterior's own noise counts too, or channels that the VAE left unused would be blown up
    # to the same size as those that carry the picture.
    std = (latents.var(axes) + variance.mean(axes)).sqrt()
    latents = (latents - mean.view(shape)) / std.view(shape)
    torch.save({
        "tokens": tokens_of(latents),
        "scene": torch.tensor([scenes.index(scene) for scene, _ in pairs]),
        "mean": mean, "std": std,
    }, work / "latents.pt")  # fmt: skip
    print("mean", [round(v, 4) for v in mean.tolist()])
    print("std", [round(v, 4) for v in std.tolist()])
    print("normalised std", [round(v, 2) for v in latents.std(axes).tolist()])


def gather(share: Tensor) -> Tensor:
    """The clips of all processes in their common order."""
    shares = [torch.empty_like(share) for _ in range(WORKERS)]
    distributed.all_gather(shares, share)
    return torch.stack(shares, dim=1).flatten(0, 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    launch(functools.partial(encode, parser.parse_args().work))
