"""Train the tiny DiT and its umT5 together, by flow matching on the encoded clips.

    python tools/tiny/train_dit.py WORK
    python tools/tiny/train_dit.py WORK --preset tiny-i2v --start CHECKPOINT --steps 2500 --rate 0.6

Reads ``latents.pt`` from WORK, for image-to-video also ``conditions.pt``; leaves ``dit.pt``
(resumable, with the averaged weights) and ``dit.csv`` (the loss curve). ``--start`` takes the first
weights from a checkpoint, and then the learning rates, ``R`` times as high, fall from the first
step on. Every step draws its data from its own number, so a run that was stopped and started again
continues as if nothing had happened.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import math
import time
from pathlib import Path

import numpy as np
import torch
from data import split_scenes
from muon import Muon
from parallel import WORKERS, average_gradients, launch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from train_vae import save
from vocabulary import build_tokenizer, pieces

from wanx.config.models import CLIP_MEAN, CLIP_STD, PRESETS, ModelConfig
from wanx.kernels.attention.op import attention
from wanx.models.dit.block import CrossAttention
from wanx.models.dit.model import WanDiT
from wanx.models.image_encoder import ImageEncoder
from wanx.models.text_encoder import UMT5Encoder
from wanx.runtime.tokens import rope_tables

GRID = (5, 4, 4)
STEPS, WARMUP, COOLDOWN, BATCH = 6000, 100, 2000, 24
MATRIX_RATE, OTHER_RATE, WEIGHT_DECAY = 2.4e-3, 1.2e-3, 0.01
SHIFT = 3.0
CAPTION_DROPOUT = 0.1
AVERAGING = 0.999
TEXT_LEN, CAPTION_LEN = 512, 10


class TextToVelocity(nn.Module):
    """Text encoder, transformer and, where there is one, image encoder as one model to train."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dit = WanDiT(config.dit)
        self.text_encoder = UMT5Encoder(config.text_encoder)
        self.image_encoder = None
        if config.image_encoder is not None:
            self.image_encoder = ImageEncoder(config.image_encoder)
        cos, sin = rope_tables(GRID, config.dit.rope_dims)
        self.register_buffer("cos", torch.from_numpy(cos), persistent=False)
        self.register_buffer("sin", torch.from_numpy(sin), persistent=False)

    def context(self, ids: Tensor, length: int) -> Tensor:
        """Features of ids [B, n] (0 is padding), zero-padded to [B, length, D]."""
        mask = (ids != 0).float()
        features = self.text_encoder(ids, mask) * mask[..., None]
        return F.pad(features, (0, 0, 0, length - ids.shape[1]))

    def forward(
        self, tokens: Tensor, timestep: Tensor, context: Tensor, pixels: Tensor | None = None
    ) -> Tensor:
        """Velocity [B, L, 64], features ordered (ph, pw, c)."""
        image = None if self.image_encoder is None else self.image_encoder(pixels)
        out: Tensor = self.dit(tokens, timestep, context, self.cos, self.sin, image)
        return out


def build(preset: str) -> TextToVelocity:
    """A freshly initialised model with the sizes of the preset and the vocabulary at hand."""
    config = PRESETS[preset]
    text = dataclasses.replace(config.text_encoder, vocab_size=len(pieces()))
    model = TextToVelocity(dataclasses.replace(config, text_encoder=text))
    for module in model.dit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.zeros_(model.dit.head.head.weight)
    return model


def stand_for_all_pads(model: TextToVelocity) -> None:
    """Let the last context token stand for every padding token of a 512 token context.

    Padding is attended unmasked and all of it is equal, so one pad whose score is raised by
    log(number of pads) is the same function at a fraction of the cost.
    """
    pads = TEXT_LEN - CAPTION_LEN
    bias = torch.zeros(1, 1, 1, CAPTION_LEN + 1)
    bias[..., -1] = math.log(pads)
    for layer in model.dit.modules():
        if isinstance(layer, CrossAttention):
            layer.forward = functools.partial(  # type: ignore[method-assign]
                _attend_to_text, layer, bias
            )


def _attend_to_text(
    layer: CrossAttention, bias: Tensor, x: Tensor, text: Tensor, image: Tensor | None
) -> Tensor:
    q = layer.norm_q(layer.q(x))
    k = layer.norm_k(layer.k(text))
    y = attention(q, k, layer.v(text), num_heads=layer.num_heads, bias=bias)
    if image is not None:
        k = layer.norm_k_img(layer.k_img(image))
        y = y + attention(q, k, layer.v_img(image), num_heads=layer.num_heads)
    out: Tensor = layer.o(y)
    return out


def caption_ids() -> Tensor:
    """Token ids of the training scenes' captions, and of the empty caption last: [n + 1, 10]."""
    tokenizer = build_tokenizer()
    scenes, _ = split_scenes()
    rows = [tokenizer.encode(caption).ids for caption in [*(s.caption for s in scenes), ""]]
    assert max(map(len, rows)) == CAPTION_LEN
    return torch.tensor([row + [0] * (CAPTION_LEN - len(row)) for row in rows])


def noise_levels(generator: np.random.Generator, count: int) -> np.ndarray:
    """Half as the sampler's shifted grid has them, half around the middle, where outlines form."""
    uniform = generator.uniform(size=count)
    shifted = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
    middle = 1 / (1 + np.exp(-generator.normal(size=count)))
    return np.where(np.arange(count) % 2, shifted, middle)


def first_frame_mask() -> Tensor:
    """Tokens [80, 16] of the mask that tells given frames: the first latent frame is given."""
    mask = torch.zeros(GRID[0], GRID[1] * GRID[2], 16)
    mask[0] = 1
    return mask.flatten(0, 1)


def clip_pixels(frames: Tensor, size: int) -> Tensor:
    """Frames [B, 3, H, W], uint8, as CLIP takes them: [B, 3, size, size]."""
    resized = F.interpolate(frames / 127.5 - 1, (size, size), mode="bicubic")
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (resized * 0.5 + 0.5 - mean) / std


def draw(
    generator: np.random.Generator, tokens: Tensor, scene: Tensor, captions: Tensor
) -> tuple[Tensor, ...]:
    """Clips, noisy tokens, timesteps, caption ids and target velocities of a process's step."""
    count = BATCH // WORKERS
    rows = torch.from_numpy(generator.integers(0, len(tokens), count))
    timestep = np.floor(1000 * noise_levels(generator, count)).clip(1, 999)
    noise = torch.from_numpy(generator.standard_normal((count, *tokens.shape[1:]), np.float32))
    dropped = torch.from_numpy(generator.uniform(size=count) < CAPTION_DROPOUT)
    ids = captions[torch.where(dropped, len(captions) - 1, scene[rows])]
    clean = tokens[rows]
    time = torch.from_numpy(timestep.astype(np.float32))
    sigma = (time / 1000)[:, None, None]
    # The input orders a token's features (c, ph, pw), the output (ph, pw, c).
    velocity = (noise - clean).reshape(count, -1, 16, 4).transpose(-1, -2).flatten(-2)
    return rows, (1 - sigma) * clean + sigma * noise, time, ids, velocity


@dataclasses.dataclass(frozen=True)
class Course:
    """One training run: where its files are, where it starts from, and how long it goes on."""

    work: Path
    preset: str
    start: Path | None
    steps: int
    rate: float

    def schedule(self, step: int) -> float:
        """Factor of the learning rates: warm-up, constant in a fresh run, linear to zero."""
        cooldown = COOLDOWN if self.start is None else self.steps
        return self.rate * min(1.0, (step + 1) / WARMUP, (self.steps - step) / cooldown)


def load_weights(model: TextToVelocity, folder: Path) -> None:
    """Take the weights of a checkpoint that ``checkpoint.py`` wrote, as far as it has them.

    What a text-to-video checkpoint lacks starts so that the model draws the same videos: new input
    channels and the values of the attention to images with zeros.
    """
    dit = load_file(folder / "diffusion_pytorch_model.safetensors")
    patches = dit["patch_embedding.weight"].flatten(1)
    missing = model.dit.patch_embedding.in_features - patches.shape[1]
    dit["patch_embedding.weight"] = F.pad(patches, (0, missing))
    if missing:
        for name, tensor in model.dit.state_dict().items():
            if name not in dit:
                dit[name] = torch.zeros_like(tensor) if ".v_img." in name else tensor
    model.dit.load_state_dict(dit)
    text_encoder = load_file(folder / "models_t5_umt5-xxl-enc-bf16.safetensors")
    model.text_encoder.load_state_dict(text_encoder)


def optimizers(model: TextToVelocity) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the DiT's blocks, AdamW for everything else."""
    matrices = [p for p in model.dit.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(matrices, MATRIX_RATE, WEIGHT_DECAY),
        torch.optim.AdamW(others, OTHER_RATE, (0.9, 0.98), weight_decay=WEIGHT_DECAY, fused=True),
    ]


@torch.no_grad()
def average(target: nn.Module, source: nn.Module, step: int) -> None:
    """Exponential moving average of the weights, faster in the beginning."""
    share = 1 - min(AVERAGING, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), share)


def train(course: Course, rank: int) -> None:
    """Train, printing and saving now and then."""
    torch.manual_seed(0)
    work = course.work
    encoded = torch.load(work / "latents.pt", weights_only=True)
    tokens, scene, captions = encoded["tokens"], encoded["scene"], caption_ids()
    image_encoder, mask = PRESETS[course.preset].image_encoder, first_frame_mask()
    if image_encoder is not None:
        conditions = torch.load(work / "conditions.pt", weights_only=True)
    model = build(course.preset)
    if course.start is not None:
        load_weights(model, course.start)
    averaged = copy.deepcopy(model)
    chosen = optimizers(model)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in chosen]
    start = 0
    if (work / "dit.pt").exists():
        state = torch.load(work / "dit.pt", weights_only=True)
        model.load_state_dict(state["model"])
        averaged.load_state_dict(state["averaged"])
        for optimizer, saved in zip(chosen, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start = state["step"]
    stand_for_all_pads(model)
    began, recent = time.monotonic(), []
    for step in range(start, course.steps):
        for optimizer, rate in zip(chosen, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * course.schedule(step)
        generator = np.random.default_rng([2, step, rank])
        rows, noisy, timestep, ids, target = draw(generator, tokens, scene, captions)
        pixels = None
        if image_encoder is not None:
            # Features of a token are ordered (c, ph, pw): latent, mask, first frame.
            given = conditions["tokens"][rows]
            noisy = torch.cat([noisy, mask.expand(len(rows), -1, -1), given], dim=-1)
            pixels = clip_pixels(
                conditions["frames"][rows], PRESETS[course.preset].image_encoder.image_size
            )
        velocity = model(noisy, timestep, model.context(ids, CAPTION_LEN + 1), pixels)
        loss = F.mse_loss(velocity, target)
        model.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        average_gradients(model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        for optimizer in chosen:
            optimizer.step()
        average(averaged, model, step)
        recent.append(loss.item())
        done = step + 1
        if done % 50 == 0 and rank == 0:
            seconds = (time.monotonic() - began) / (done - start)
            line = f"{done},{np.mean(recent):.5f},{seconds:.3f}"
            print(line, flush=True)
            with (work / "dit.csv").open("a") as log:
                log.write(line + "\n")
        if done % 50 == 0:
            recent = []
        if (done % 500 == 0 or done == course.steps) and rank == 0:
            save(work / "dit.pt", {
                "model": model.state_dict(), "averaged": averaged.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in chosen], "step": done,
            })  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--preset", choices=("tiny", "tiny-i2v"), default="tiny")
    parser.add_argument("--start", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rate", type=float, default=1.0)
    course = Course(**vars(parser.parse_args()))
    launch(functools.partial(train, course))
