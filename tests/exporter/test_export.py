"""Exported components on ONNX Runtime against diffusers and transformers, at every precision."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from tests.support.components import (
    run_dit,
    run_image_encoder,
    run_text_encoder,
    run_vae_decoder,
    run_vae_encoder,
)
from tests.support.peers import image_features, random_dit, relative_error
from wanx.bundle.reader import Bundle
from wanx.runtime.tokens import patchify

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# (frames, height, width) of the latent; 1, 7, 45, 198 and, for a video of 81 frames, 63 tokens.
LATENTS = [(1, 2, 2), (1, 2, 14), (3, 6, 10), (2, 18, 22), (21, 2, 6)]


BundleOf = Callable[[str, str], Bundle]


def rounded(module: torch.nn.Module, precision: str) -> Any:
    """A copy of ``module`` that computes in fp32 with weights rounded to ``precision``."""
    module = copy.deepcopy(module)
    for parameter in module.parameters():
        parameter.copy_(parameter.to(PRECISIONS[precision]))
    return module


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("latent", LATENTS)
def test_dit(
    latent: tuple[int, int, int],
    precision: str,
    peer: WanPipeline,
    bundles: Callable[[str], Bundle],
) -> None:
    x, context = random(16, *latent), random(1, 512, 40)
    context[:, 9:] = 0
    expected = rounded(peer.transformer, precision)(
        torch.from_numpy(x[None]),
        torch.tensor([500.0]),
        torch.from_numpy(context),
        return_dict=False,
    )[0][0]
    out = run_dit(bundles(precision), x, 500.0, context)
    assert out.dtype == np.float32
    assert relative_error(out, expected) <= 1e-5


@pytest.mark.parametrize("timestep", [0.0, 1.0, 999.0, 1000.0])
def test_dit_timesteps(timestep: float, peer: WanPipeline, bundle_fp32: Bundle) -> None:
    x, context = random(16, 1, 4, 6), random(1, 512, 40)
    expected = peer.transformer(
        torch.from_numpy(x[None]), torch.tensor([timestep]), torch.from_numpy(context)
    ).sample[0]
    assert relative_error(run_dit(bundle_fp32, x, timestep, context), expected) <= 1e-5


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("length", [1, 7, 64, 512])
def test_text_encoder(
    length: int, precision: str, peer: WanPipeline, bundles: Callable[[str], Bundle]
) -> None:
    ids = np.random.default_rng(length).integers(0, 60, (1, length))
    expected = rounded(peer.text_encoder, precision)(torch.from_numpy(ids)).last_hidden_state
    assert relative_error(run_text_encoder(bundles(precision), ids), expected) <= 1e-5


def test_a_transformer_with_copied_blocks(
    checkpoint: Path, export_quickly: Callable[..., Bundle], tmp_path: Path
) -> None:
    """Two blocks are traced and the others copied, whose weights are stored narrow as well."""
    dit = rounded(random_dit(num_layers=5), "bf16")
    source = shutil.copytree(checkpoint, tmp_path / "deep")
    shutil.rmtree(source / "transformer")
    dit.save_pretrained(source / "transformer")
    bundle = export_quickly(source, tmp_path / "bundle", precision="bf16")
    x, context = random(16, 2, 4, 6), random(1, 512, 40)
    expected = dit(
        torch.from_numpy(x[None]), torch.tensor([500.0]), torch.from_numpy(context)
    ).sample[0]
    assert relative_error(run_dit(bundle, x, 500.0, context), expected) <= 1e-5


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("latent", LATENTS[:3])
@pytest.mark.parametrize(("task", "images"), [("i2v", 1), ("flf2v", 2)])
def test_dit_with_images(
    task: str,
    images: int,
    latent: tuple[int, int, int],
    precision: str,
    peer_of: Callable[[str], Any],
    bundle_of: BundleOf,
) -> None:
    """diffusers takes two images as a batch and joins them where it adds their positions."""
    x, context = random(36, *latent), random(1, 512, 40)
    context[:, 9:] = 0
    features = random(images, 5, 48)
    expected = rounded(peer_of(task).transformer, precision)(
        torch.from_numpy(x[None]),
        torch.tensor([500.0]),
        torch.from_numpy(context),
        encoder_hidden_states_image=torch.from_numpy(features),
        return_dict=False,
    )[0][0]
    joined = features.reshape(1, 5 * images, 48)
    bundle = bundle_of(task, precision)
    out = run_dit(bundle, x, 500.0, context, image_context=joined)
    assert relative_error(out, expected) <= 1e-5
    other = run_dit(bundle, x, 500.0, context, image_context=joined[:, ::-1].copy())
    # The order of tokens matters where they have positions, and nowhere else.
    assert (relative_error(other, expected) > 1e-3) == (task == "flf2v")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("latent", LATENTS[:3])
def test_dit_with_control(
    latent: tuple[int, int, int],
    precision: str,
    peer_of: Callable[[str], Any],
    bundle_of: BundleOf,
) -> None:
    x, context, control = random(16, *latent), random(1, 512, 40), random(96, *latent)
    context[:, 9:] = 0
    scale = np.array([0.7, 1.6], np.float32)
    expected = rounded(peer_of("vace").transformer, precision)(
        torch.from_numpy(x[None]),
        torch.tensor([500.0]),
        torch.from_numpy(context),
        control_hidden_states=torch.from_numpy(control[None]),
        control_hidden_states_scale=torch.from_numpy(scale),
        return_dict=False,
    )[0][0]
    tokens = patchify(control)[None]
    bundle = bundle_of("vace", precision)
    out = run_dit(bundle, x, 500.0, context, vace_tokens=tokens, vace_scale=scale)
    assert relative_error(out, expected) <= 1e-5
    swapped = run_dit(bundle, x, 500.0, context, vace_tokens=tokens, vace_scale=scale[::-1].copy())
    assert relative_error(swapped, expected) > 1e-3


@pytest.mark.parametrize("task", ["i2v", "flf2v"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_image_encoder(
    precision: str, task: str, peer_of: Callable[[str], Any], bundle_of: BundleOf
) -> None:
    """It keeps its own type at every precision."""
    pixels = random(1, 3, 28, 28)
    expected = image_features(peer_of(task).image_encoder, torch.from_numpy(pixels))
    out = run_image_encoder(bundle_of(task, precision), pixels)
    assert out.shape == (1, 5, 48)
    assert relative_error(out, expected) <= 1e-5


def latent_statistics(vae: Any) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


@pytest.mark.parametrize("size", [(1, 2), (2, 5), (7, 3)])
@pytest.mark.parametrize("frames", [1, 5, 9, 81])
def test_vae_encoder(
    frames: int, size: tuple[int, int], peer: WanPipeline, bundle_of: BundleOf
) -> None:
    """1, 2, 3 and 21 latent frames; the peer encodes them in one call."""
    video = random(3, frames, 8 * size[0], 8 * size[1]).clip(-1, 1)
    mean, std = latent_statistics(peer.vae)
    raw = peer.vae.encode(torch.from_numpy(video[None])).latent_dist.mode()
    out = run_vae_encoder(bundle_of("i2v", "fp32"), video)
    assert out.shape == (16, (frames - 1) // 4 + 1, *size)
    assert relative_error(out, ((raw - mean) / std)[0]) <= 1e-5


@pytest.mark.parametrize("size", [(2, 2), (4, 10), (7, 3)])
@pytest.mark.parametrize("frames", [1, 2, 3, 21])
def test_vae_decoder(
    frames: int, size: tuple[int, int], peer: WanPipeline, bundle_fp32: Bundle
) -> None:
    """1, 5, 9 and 81 frames; the peer decodes them in one call."""
    latent = random(16, frames, *size)
    mean, std = latent_statistics(peer.vae)
    raw = torch.from_numpy(latent[None]) * std + mean
    expected = peer.vae.decode(raw, return_dict=False)[0][0]
    out = run_vae_decoder(bundle_fp32, latent)
    assert out.shape == (3, 4 * frames - 3, 8 * size[0], 8 * size[1])
    assert relative_error(out, expected) <= 1e-5
