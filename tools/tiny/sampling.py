"""Draw clips with the trained modules: the runtime's sampler and guidance around PyTorch models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from train_dit import GRID, TEXT_LEN, TextToVelocity
from vocabulary import build_tokenizer

from wanx.models.vae import WanVAE
from wanx.runtime.sampling.guidance import guide
from wanx.runtime.sampling.solvers import make_sampler
from wanx.runtime.tokens import patchify, unpatchify

LATENT_SHAPE = (16, 5, 8, 8)
STEPS, GUIDE_SCALE, SHIFT = 20, 2.5, 3.0


@torch.no_grad()
def sample(
    model: TextToVelocity,
    vae: WanVAE,
    prompts: Sequence[str],
    seeds: Sequence[int],
    guide_scale: float = GUIDE_SCALE,
) -> NDArray[np.uint8]:
    """Clips [B, F, H, W, 3], uint8, of prompts and seeds, with a full context of 512 tokens."""
    tokenizer = build_tokenizer()
    rows = [tokenizer.encode(prompt).ids for prompt in [*prompts, ""]]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    features = model.context(ids, TEXT_LEN)
    count = len(prompts)
    context = torch.cat([features[:count], features[-1:].expand(count, -1, -1)])
    latents = np.stack([
        torch.randn(LATENT_SHAPE, generator=torch.Generator().manual_seed(seed)).numpy()
        for seed in seeds
    ])  # fmt: skip
    sampler = make_sampler("unipc", STEPS, SHIFT)
    for timestep in sampler.timesteps:
        tokens = torch.from_numpy(np.stack([patchify(latent) for latent in latents]))
        time = torch.full((2 * count,), float(timestep))
        velocity = model(tokens.repeat(2, 1, 1), time, context).numpy()
        guided = guide(velocity[:count], velocity[count:], guide_scale)
        latents = sampler.step(np.stack([unpatchify(v, GRID) for v in guided]), latents)
    video = vae.decode(torch.from_numpy(latents)).permute(0, 2, 3, 4, 1)
    return ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
