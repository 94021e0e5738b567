"""Train the tiny VAE: crops first, whole clips afterwards.

    python tools/tiny/train_vae.py WORK

Every step draws its data from its own number, so a run that was stopped and started again continues
as if nothing had happened. Leaves ``vae.pt`` (resumable) and ``vae.csv`` (the loss curve) in WORK.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import time
from pathlib import Path

import numpy as np
import torch
from data import SIZE, as_input, render, split_scenes, trajectory
from parallel import WORKERS, average_gradients, launch
from torch import Tensor, nn

from wanx.config.models import PRESETS, VAEConfig
from wanx.models.vae import History, WanVAE

CROP_STEPS, CROP_BATCH, CROP_SIZE, CROP_FRAMES = 1000, 8, 32, 9
FULL_STEPS, FULL_BATCH = 1000, 2
STEPS = CROP_STEPS + FULL_STEPS
LEARNING_RATE = 2e-3
WARMUP, COSINE, COOLDOWN = 50, 3000, 600
KL_WEIGHT = 3e-5
EVALUATION_SEED = 900_000


def training_config() -> VAEConfig:
    """The tiny VAE with latents left as they are: their statistics are measured afterwards."""
    return dataclasses.replace(PRESETS["tiny"].vae, latent_mean=(0.0,) * 16, latent_std=(1.0,) * 16)


def initialise(vae: WanVAE) -> None:
    """Orthogonal image filters, damped residual branches, a posterior that is almost certain.

    Temporal kernels start on their last tap, so the network begins by treating frames as images.
    The default initialisation stays at 13 dB for hundreds of steps.
    """
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 4 and parameter.shape[1] > 1:
                parameter.copy_(orthogonal(parameter.shape))
            elif parameter.ndim == 5:
                parameter.normal_(std=0.02 / math.sqrt(parameter[0].numel()))
                parameter[:, :, -1].add_(orthogonal(parameter[:, :, -1].shape))
            if ".residual.6." in name:
                parameter.mul_(0.2)
        certainty = slice(vae.conv1.out_channels // 2, None)
        vae.conv1.weight[certainty].mul_(0.1)
        assert vae.conv1.bias is not None
        vae.conv1.bias[certainty].fill_(-5.0)


def channels_last(vae: WanVAE) -> None:
    """Lay the filters out as the convolutions of CPUs want them, which saves a third of a step."""
    for parameter in vae.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.contiguous(memory_format=torch.channels_last_3d)
        elif parameter.ndim == 4:
            parameter.data = parameter.contiguous(memory_format=torch.channels_last)


def orthogonal(shape: torch.Size) -> Tensor:
    """Filters of orthonormal rows (or columns, where there are fewer of them)."""
    return nn.init.orthogonal_(torch.empty(shape[0], math.prod(shape[1:]))).view(shape)


def distribution(vae: WanVAE, video: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance of the latents: two of [B, 16, T, h, w], float32."""
    mean, log_variance = vae.moments(video)
    return mean.float(), log_variance.float().clamp(-20.0, 10.0)


def reconstruct(vae: WanVAE, latents: Tensor) -> Tensor:
    """Decode without the final clamp, whose gradient is zero outside of [-1, 1]."""
    history = History(keep=False)
    video: Tensor = vae.decoder(vae.conv2(latents, history), history)
    return video


def crop(clip: np.ndarray, direction: str, seed: int, generator: np.random.Generator) -> np.ndarray:
    """Cut [CROP_FRAMES, CROP_SIZE, CROP_SIZE, 3] out of a clip, at the outline of its shape."""
    first = int(generator.integers(0, clip.shape[0] - CROP_FRAMES + 1))
    _, centres = trajectory(direction, seed)
    corner = np.array(centres[first + CROP_FRAMES // 2]) + generator.uniform(-14, 14, 2)
    left, top = np.clip(corner - CROP_SIZE / 2, 0, SIZE - CROP_SIZE).astype(int)
    return clip[first : first + CROP_FRAMES, top : top + CROP_SIZE, left : left + CROP_SIZE]


def batch(step: int, rank: int) -> Tensor:
    """One process's clips of one step: [B, 3, F, H, W] in [-1, 1]."""
    generator = np.random.default_rng([1, step, rank])
    scenes, _ = split_scenes()
    full = step >= CROP_STEPS
    clips = []
    for _ in range((FULL_BATCH if full else CROP_BATCH) // WORKERS):
        scene = scenes[generator.integers(len(scenes))]
        seed = int(generator.integers(2**31))
        clip = render(scene, seed)
        clips.append(as_input(clip if full else crop(clip, scene.direction, seed, generator)))
    return torch.from_numpy(np.stack(clips))


def loss_of(vae: WanVAE, video: Tensor, seed: int) -> tuple[Tensor, float]:
    """L1 + squared error + KL, and the PSNR in dB."""
    mean, log_variance = distribution(vae, video)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))
    rebuilt = reconstruct(vae, mean + torch.exp(0.5 * log_variance) * noise).float()
    difference = rebuilt - video
    squared = difference.square().mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    loss = difference.abs().mean() + squared + KL_WEIGHT * kl
    return loss, 10 * math.log10(4 / squared.item())


@torch.no_grad()
def held_out_psnr(vae: WanVAE, clips: int = 12) -> float:
    """PSNR in dB of reconstructions of scenes that training never shows."""
    _, scenes = split_scenes()
    errors = []
    for i in range(clips):
        clip = render(scenes[i * 3 % len(scenes)], EVALUATION_SEED + i)
        video = torch.from_numpy(as_input(clip))[None]
        rebuilt = reconstruct(vae, distribution(vae, video)[0]).float().clamp(-1, 1)
        errors.append((rebuilt - video).square().mean().item())
    return 10 * math.log10(4 / float(np.mean(errors)))


def learning_rate(step: int) -> float:
    """Linear warm-up, a slow cosine, and a linear way down to zero at the end."""
    warm = min(1.0, (step + 1) / WARMUP)
    cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - WARMUP) / (COSINE - WARMUP)))
    return LEARNING_RATE * warm * (0.01 + 0.99 * cosine) * min(1.0, (STEPS - step) / COOLDOWN)


def save(path: Path, state: dict[str, object]) -> None:
    """Replace a checkpoint in one move."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def train(work: Path, rank: int) -> None:
    """Train, printing and saving now and then."""
    torch.manual_seed(0)
    vae = WanVAE(training_config())
    initialise(vae)
    channels_last(vae)
    optimizer = torch.optim.AdamW(
        vae.parameters(), LEARNING_RATE, (0.9, 0.99), weight_decay=1e-4, fused=True
    )
    start = 0
    if (work / "vae.pt").exists():
        state = torch.load(work / "vae.pt", weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    began = time.monotonic()
    for step in range(start, STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        video = batch(step, rank).contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast("cpu", torch.bfloat16):
            loss, psnr = loss_of(vae, video, WORKERS * step + rank)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        average_gradients(vae.parameters())
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        done = step + 1
        if done % 25 == 0 and rank == 0:
            seconds = (time.monotonic() - began) / (done - start)
            line = f"{done},{loss.item():.5f},{psnr:.2f},{seconds:.3f}"
            print(line, flush=True)
            with (work / "vae.csv").open("a") as log:
                log.write(line + "\n")
        if (done % 250 == 0 or done == STEPS) and rank == 0:
            save(work / "vae.pt", {
                "vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": done,
            })  # fmt: skip
            print(f"held out: {held_out_psnr(vae):.2f} dB at step {done}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    folder: Path = parser.parse_args().work
    folder.mkdir(parents=True, exist_ok=True)
    launch(functools.partial(train, folder))
