"""Train a LoRA for the built-in model: shapes that grow while they move, which it never saw.

    python tools/tiny/train_lora.py tools/tiny/growing.safetensors

Low-rank matrices beside the linears of the blocks learn by flow matching on clips of a growing
shape; everything else stays as it is. It takes some minutes on two cores. Captions say nothing of
the growth: it comes with the LoRA.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from data import BACKGROUNDS, COLOURS, FRAMES, Scene, as_input, coverage, split_scenes, trajectory
from latents import tokens_of
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from train_dit import CAPTION_LEN, TextToVelocity, build, caption_ids, draw, stand_for_all_pads

from tools.repackage import tensors_of
from wanx.exporter.source import open_source
from wanx.models.vae import WanVAE

RANK, ALPHA = 4, 8
STEPS, WARMUP, RATE = 900, 50, 2e-3
CLIPS, ENCODED_AT_ONCE = 705, 15
GROWTH = (0.7, 1.15)  # of the radius, in the first frame and in the last
TARGETS = ("q", "k", "v", "o", "0", "2")  # of attentions and of the feed-forward network


class LoraLinear(nn.Module):
    """A linear with a product of two small matrices beside it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(RANK, linear.in_features) / math.sqrt(RANK))
        self.up = nn.Parameter(torch.zeros(linear.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        """Output with the product of strength 1."""
        return self.linear(x) + ALPHA / RANK * F.linear(F.linear(x, self.down), self.up)


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


def with_lora(model: TextToVelocity) -> dict[str, LoraLinear]:
    """Put a LoRA beside every linear of the blocks; returns them by the names of the linears."""
    found = {}
    for name, module in list(model.dit.named_modules()):
        for child, linear in module.named_children():
            inside = name.startswith("blocks.") and child in TARGETS
            if inside and isinstance(linear, nn.Linear):
                found[f"{name}.{child}"] = LoraLinear(linear)
                setattr(module, child, found[f"{name}.{child}"])
    return found


def main() -> None:
    """Train and write the file, with names as ComfyUI has them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    source = open_source("tiny")
    vae, model = WanVAE(source.config.vae), build("tiny")
    vae.load_state_dict(tensors_of(source.components["vae"]))
    for module, component in ((model.dit, "dit"), (model.text_encoder, "text_encoder")):
        weights = tensors_of(source.components[component])
        if component == "dit":
            weights["patch_embedding.weight"] = weights["patch_embedding.weight"].flatten(1)
        module.load_state_dict(weights)
    model.requires_grad_(False)
    loras = with_lora(model)
    stand_for_all_pads(model)
    began = time.monotonic()
    tokens, scene = encode(vae.eval())
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
    file = {}
    for name, lora in loras.items():
        file[f"diffusion_model.{name}.lora_down.weight"] = lora.down.detach().bfloat16()
        file[f"diffusion_model.{name}.lora_up.weight"] = lora.up.detach().bfloat16()
        file[f"diffusion_model.{name}.alpha"] = torch.tensor(float(ALPHA))
    save_file(file, arguments.output)


if __name__ == "__main__":
    main()
