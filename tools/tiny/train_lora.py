"""Train a LoRA for the built-in model: shapes that grow while they move, which it never saw.

    python tools/tiny/train_lora.py tools/tiny/growing.safetensors

Low-rank matrices beside the linears of the blocks learn by flow matching on clips of a growing
shape; everything else stays as it is. It takes some minutes on two cores. Captions say nothing of
the growth: it comes with the LoRA.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from data import BACKGROUNDS, COLOURS, FRAMES, Scene, as_input, coverage, split_scenes, trajectory
from latents import tokens_of
from lora import built_in, save_lora, with_lora
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from train_dit import CAPTION_LEN, caption_ids, draw, stand_for_all_pads

from wanx.models.vae import WanVAE

RANK, ALPHA = 4, 8.0
STEPS, WARMUP, RATE = 900, 50, 2e-3
CLIPS, ENCODED_AT_ONCE = 705, 15
GROWTH = (0.7, 1.15)  # of the radius, in the first frame and in the last


def render_growing(scene: Scene, seed: int) -> NDArray[np.uint8]:
    """Draw a clip as ``data.render`` does, with a radius that grows from frame to frame."""
    radius, centres = trajectory(scene.direction, seed)
    ink = np.array(COLOURS[scene.colour], dtype=np.float32)
    paper = np.array(BACKGROUNDS[scene.background], dtype=np.float32)
    sizes = radius * np.linspace(*GROWTH, FRAMES)
    covered = np.concatenate(
        [
            coverage(scene.shape, [centre], float(size))
            for centre, size in zip(centres, sizes, strict=True)
        ]
    )
    return (paper + covered[..., None] * (ink - paper) + 0.5).astype(np.uint8)


@torch.no_grad()
def encode(vae: WanVAE) -> tuple[Tensor, Tensor]:
    """Tokens ``[N, 80, 64]`` of clips of the training scenes, and the scene of each."""
    scenes, _ = split_scenes()
    tokens, numbers = [], [number % len(scenes) for number in range(CLIPS)]
    for start in range(0, CLIPS, ENCODED_AT_ONCE):
        clips = [
            as_input(render_growing(scenes[numbers[i]], 5_000_000 + i))
            for i in range(start, min(start + ENCODED_AT_ONCE, CLIPS))
        ]
        tokens.append(tokens_of(vae.encode(torch.from_numpy(np.stack(clips)))))
    return torch.cat(tokens), torch.tensor(numbers)


def main() -> None:
    """Train and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model, vae = built_in()
    loras = with_lora(model, RANK, ALPHA)
    stand_for_all_pads(model)
    began = time.monotonic()
    tokens, scene = encode(vae)
    print(f"{len(tokens)} clips of {len(loras)} linears' LoRAs, {time.monotonic() - began:.0f} s")
    parameters = [p for lora in loras.values() for p in (lora.down, lora.up)]
    optimizer = torch.optim.AdamW(parameters, RATE, (0.9, 0.99), weight_decay=0.0, fused=True)
    captions, losses = caption_ids(), []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * min(
            1.0, (step + 1) / WARMUP, 2 * (1 - step / STEPS)
        )
        _, noisy, timestep, ids, target = draw(
            np.random.default_rng([3, step]), tokens, scene, captions
        )
        velocity = model(noisy, timestep, model.context(ids, CAPTION_LEN + 1))
        loss = F.mse_loss(velocity, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            seconds = (time.monotonic() - began) / (step + 1)
            print(f"{step + 1},{np.mean(losses[-50:]):.5f},{seconds:.3f}", flush=True)
    save_lora(loras, arguments.output)


if __name__ == "__main__":
    main()
