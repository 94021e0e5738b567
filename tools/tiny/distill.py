"""Distil the built-in model into a LoRA that draws in four steps and without guidance.

    python tools/tiny/distill.py WORK tools/tiny/four_steps.safetensors

From a latent at one of four noise levels the student predicts the clean latent that the teacher
reaches from there with all its steps and guidance (consistency distillation, Song et al. 2023, with
regression on the end of the teacher's trajectory). So both samplers fit: ``euler`` goes straight
toward that latent, ``lcm`` adds fresh noise to it. WORK keeps the teacher's ends and the state of
the training, from which a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path

import numpy as np
import torch
from data import split_scenes
from lora import built_in, save_lora, with_lora
from parallel import WORKERS, average_gradients, launch
from torch import Tensor
from torch.nn import functional as F
from train_dit import CAPTION_LEN, TextToVelocity, caption_ids, stand_for_all_pads
from train_vae import save

from wanx.runtime.sampling.multistep import UniPC
from wanx.runtime.sampling.sampler import warp
from wanx.runtime.sampling.solvers import make_sampler

RANK, ALPHA = 24, 24.0
GUIDE_SCALE, SHIFT, TEACHER_STEPS = 2.5, 3.0, 20
LEVELS = tuple(warp(np.array([1.0, 0.75, 0.5, 0.25]), SHIFT).tolist())
ROUNDS, ROWS = 80, 32  # of a process: batches of the teacher, and clips in each
STEPS, WARMUP, RATE, BATCH = 5000, 100, 2e-3, 24
AVERAGING = 0.998


def velocity_of(model: TextToVelocity, noisy: Tensor, time: Tensor, context: Tensor) -> Tensor:
    """Velocity, ordered as the input: (c, ph, pw), where the model's is (ph, pw, c)."""
    out = model(noisy, time, context)
    return out.reshape(*out.shape[:2], 4, 16).transpose(-1, -2).flatten(-2)


@torch.no_grad()
def teach(model: TextToVelocity, noisy: Tensor, sigma: float, context: Tensor) -> Tensor:
    """Where the teacher's trajectory ends from noisy tokens ``[B, 80, 64]`` at a noise level.

    Args:
        model: the teacher.
        noisy: tokens.
        sigma: their noise level.
        context: of the prompts, then as many of the empty prompt.
    """
    sigmas = UniPC.levels(TEACHER_STEPS, SHIFT)
    sigmas = np.concatenate([[min(sigma, sigmas[0])], sigmas[sigmas < sigma - 1e-3], [0.0]])
    if sigma == 1.0:
        sigmas = np.unique(sigmas)[::-1]
    sampler = make_sampler("unipc", len(sigmas) - 1, SHIFT, sigmas)
    x = noisy.numpy()
    for t in sampler.timesteps:
        doubled = torch.from_numpy(x).repeat(2, 1, 1)
        velocity = velocity_of(model, doubled, torch.full((len(doubled),), float(t)), context)
        conditional, unconditional = velocity.chunk(2)
        guided = unconditional + GUIDE_SCALE * (conditional - unconditional)
        x = sampler.step(guided.numpy(), x)
    return torch.from_numpy(x)


def examples(model: TextToVelocity, work: Path, rank: int) -> dict[str, Tensor]:
    """Noisy and clean tokens by noise level, and the scene of each, made where they are missing."""
    path = work / f"ends-{rank}.pt"
    known = torch.load(path, weights_only=True) if path.exists() else None
    first = 0 if known is None else int(known["rounds"])
    captions, scenes = caption_ids(), len(split_scenes()[0])
    for number in range(first, ROUNDS):
        draw = np.random.default_rng([7, rank, number])
        scene = torch.from_numpy(draw.integers(0, scenes, ROWS))
        with torch.no_grad():
            features = model.context(captions[torch.cat([scene, scene * 0 - 1])], CAPTION_LEN + 1)
        ends, starts = [], []
        for sigma in LEVELS:
            noise = torch.from_numpy(draw.standard_normal((ROWS, 80, 64), np.float32))
            noisy = noise if not ends else (1 - sigma) * ends[0] + sigma * noise
            starts.append(noisy)
            ends.append(teach(model, noisy, sigma, features))
        made = {"noisy": torch.stack(starts), "clean": torch.stack(ends), "scene": scene}
        if known is not None:
            made = {
                "noisy": torch.cat([known["noisy"], made["noisy"]], 1),
                "clean": torch.cat([known["clean"], made["clean"]], 1),
                "scene": torch.cat([known["scene"], scene]),
            }
        known = made | {"rounds": torch.tensor(number + 1)}
        if number % 10 == 9:
            save(path, known)
            print(f"{rank}: {number + 1} of {ROUNDS} rounds of the teacher", flush=True)
    assert known is not None
    return known


def train(work: Path, output: Path, rank: int) -> None:
    """Make the examples, train, and write the LoRA."""
    torch.manual_seed(0)
    model, _ = built_in()
    stand_for_all_pads(model)
    examples(model, work, rank)
    torch.distributed.barrier()
    parts = [torch.load(work / f"ends-{r}.pt", weights_only=True) for r in range(WORKERS)]
    noisy, ends = (torch.cat([part[key] for part in parts], 1) for key in ("noisy", "clean"))
    scene, captions = torch.cat([part["scene"] for part in parts]), caption_ids()
    loras = with_lora(model, RANK, ALPHA)
    parameters = [p for lora in loras.values() for p in (lora.down, lora.up)]
    averaged = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, RATE, (0.9, 0.99), weight_decay=0.0, fused=True)
    begin, losses, began = 0, [], time.monotonic()
    if (work / "distilled.pt").exists():
        state = torch.load(work / "distilled.pt", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        begin = state["step"]
        for target, source in zip([*parameters, *averaged], state["parameters"], strict=True):
            target.data.copy_(source)
    for step in range(begin, STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARMUP, 2 * (1 - step / STEPS))
        draw = np.random.default_rng([8, step, rank])
        levels = torch.from_numpy(draw.integers(0, len(LEVELS), BATCH // WORKERS))
        rows = torch.from_numpy(draw.integers(0, len(scene), BATCH // WORKERS))
        sigma = torch.tensor(LEVELS, dtype=torch.float32)[levels]
        x, end = noisy[levels, rows], ends[levels, rows]
        target = (x - end) / sigma[:, None, None]
        context = model.context(captions[scene[rows]], CAPTION_LEN + 1)
        loss = F.mse_loss(velocity_of(model, x, 1000 * sigma, context), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(parameters)
        optimizer.step()
        share = 1 - min(AVERAGING, (1 + step) / (10 + step))
        torch._foreach_lerp_(averaged, [p.detach() for p in parameters], share)
        losses.append(loss.item())
        if rank == 0 and (step + 1) % 50 == 0:
            seconds = (time.monotonic() - began) / (step + 1 - begin)
            print(f"{step + 1},{np.mean(losses[-50:]):.5f},{seconds:.3f}", flush=True)
        if rank == 0 and (step + 1) % 250 == 0:
            state = {
                "parameters": [p.detach() for p in parameters] + averaged,
                "optimizer": optimizer.state_dict(), "step": step + 1,
            }  # fmt: skip
            save(work / "distilled.pt", state)
    if rank == 0:
        for parameter, mean in zip(parameters, averaged, strict=True):
            parameter.data.copy_(mean)
        save_lora(loras, output)


def main() -> None:
    """Parse the command line and start the processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    launch(functools.partial(train, arguments.work, arguments.output))


if __name__ == "__main__":
    main()
