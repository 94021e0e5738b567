"""Sharpen the VAE's decoder on the final latents, with the encoder frozen.

    python tools/tiny/train_decoder.py WORK

Reads ``vae.pt`` and ``latents.pt`` from WORK; leaves ``decoder.pt`` (resumable; holds the whole
VAE) and ``decoder.csv``. The latents stay what they are, so the DiT may train before or after.
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path

import numpy as np
import torch
from data import as_input, dataset, render, split_scenes
from latents import CLIPS, load_vae
from parallel import WORKERS, average_gradients, launch
from torch import Tensor, nn
from torch.nn import functional as F
from train_vae import channels_last, held_out_psnr, reconstruct, save

STEPS, WARMUP, COOLDOWN, BATCH = 3200, 50, 1600, 2
LEARNING_RATE = 1.2e-3
# Up to this deviation: what the DiT draws is not exactly what the encoder gives.
LATENT_NOISE = 0.15
OUTLINE_WEIGHT = 6.0


def outline_weights(video: Tensor) -> Tensor:
    """1, and more within two pixels of the outline: [B, 1, F, H, W]."""
    low = -F.max_pool3d(-video, (1, 5, 5), 1, (0, 2, 2))
    high = F.max_pool3d(video, (1, 5, 5), 1, (0, 2, 2))
    return 1 + OUTLINE_WEIGHT * ((high - low).amax(1, keepdim=True) > 0.2)


def latents_of(tokens: Tensor) -> Tensor:
    """Undo ``tokens_of`` for clips of 64 x 64 pixels: [B, 80, 64] to [B, 16, 5, 8, 8]."""
    patches = tokens.reshape(-1, 5, 4, 4, 16, 2, 2).permute(0, 4, 1, 2, 5, 3, 6)
    return patches.reshape(-1, 16, 5, 8, 8)


def train(work: Path, rank: int) -> None:
    """Train, printing and saving now and then."""
    vae = load_vae(work)
    channels_last(vae)
    encoded = torch.load(work / "latents.pt", weights_only=True)
    mean, std = (encoded[name].view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    pairs = dataset(split_scenes()[0], CLIPS, seed=1)
    trained = [*vae.conv2.parameters(), *vae.decoder.parameters()]
    optimizer = torch.optim.AdamW(trained, LEARNING_RATE, (0.9, 0.99), fused=True)
    start = 0
    if (work / "decoder.pt").exists():
        state = torch.load(work / "decoder.pt", weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    began, recent = time.monotonic(), []
    for step in range(start, STEPS):
        rate = min(1.0, (step + 1) / WARMUP, (STEPS - step) / COOLDOWN)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate
        generator = np.random.default_rng([3, step, rank])
        rows = generator.integers(0, CLIPS, BATCH // WORKERS)
        clean = latents_of(encoded["tokens"][torch.from_numpy(rows)])
        noise = torch.from_numpy(generator.standard_normal(clean.shape, np.float32))
        level = torch.from_numpy(generator.uniform(0, LATENT_NOISE, (len(rows), 1, 1, 1, 1)))
        latents = (clean + level.float() * noise) * std + mean
        video = torch.from_numpy(np.stack([as_input(render(*pairs[row])) for row in rows]))
        with torch.autocast("cpu", torch.bfloat16):
            rebuilt = reconstruct(
                vae, latents.contiguous(memory_format=torch.channels_last_3d)
            ).float()
        difference = rebuilt - video
        error = difference.abs() + difference.square()
        loss = (error * outline_weights(video)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        average_gradients(trained)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        recent.append(difference.detach().square().mean().item())
        done = step + 1
        if done % 25 == 0 and rank == 0:
            seconds = (time.monotonic() - began) / (done - start)
            psnr = 10 * np.log10(4 / np.mean(recent))
            recent = []
            line = f"{done},{loss.item():.5f},{psnr:.2f},{seconds:.3f}"
            print(line, flush=True)
            with (work / "decoder.csv").open("a") as log:
                log.write(line + "\n")
        if (done % 100 == 0 or done == STEPS) and rank == 0:
            save(work / "decoder.pt", {
                "vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": done,
            })  # fmt: skip
            print(f"held out: {held_out_psnr(vae):.2f} dB at step {done}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    launch(functools.partial(train, parser.parse_args().work))
