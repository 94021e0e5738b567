"""The VAE against diffusers' AutoencoderKLWan, whole clips and streams, with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.peers import VAE_SIZES, copy_weights, random_vae, relative_error
from wanx.checkpoints.key_maps import vae_key_map
from wanx.config.models import VAEConfig
from wanx.models.vae import History, WanVAE

SIZES: list[dict[str, Any]] = [
    {},
    # As published, but narrow.
    {"base_dim": 4, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2},
    {"base_dim": 2, "dim_mult": [3, 1, 2], "temperal_downsample": [True, False]},
    {"base_dim": 4, "dim_mult": [1, 2], "temperal_downsample": [False], "z_dim": 3},
]


def build_pair(**sizes: Any) -> tuple[WanVAE, Any]:
    sizes = VAE_SIZES | sizes
    z_dim = sizes.setdefault("z_dim", 16)
    statistics = torch.Generator().manual_seed(3)
    sizes["latents_mean"] = torch.randn(z_dim, generator=statistics).tolist()
    sizes["latents_std"] = (torch.rand(z_dim, generator=statistics) + 0.5).tolist()
    peer = random_vae(**sizes)
    config = VAEConfig(
        base_dim=sizes["base_dim"],
        z_dim=z_dim,
        multipliers=tuple(sizes["dim_mult"]),
        num_res_blocks=sizes["num_res_blocks"],
        temporal_downsample=tuple(sizes["temperal_downsample"]),
        latent_mean=tuple(sizes["latents_mean"]),
        latent_std=tuple(sizes["latents_std"]),
    )
    key_map = vae_key_map(len(config.multipliers), config.num_res_blocks)
    ours = copy_weights(WanVAE(config), peer, key_map)
    assert isinstance(ours, WanVAE)
    return ours, peer


def statistics_of(peer: Any) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(peer.config[f"latents_{key}"]) for key in ("mean", "std"))
    return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)


def random_video(frames: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.rand(1, 3, frames, height, width, generator=generator) * 2 - 1


def random_latent(ours: WanVAE, frames: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    channels = ours.latent_mean.shape[1]
    return torch.randn(1, channels, frames, height, width, generator=generator)


@pytest.mark.parametrize("frames", [1, 5, 9, 17])
@pytest.mark.parametrize("sizes", SIZES)
def test_encoder(sizes: dict[str, Any], frames: int) -> None:
    ours, peer = build_pair(**sizes)
    video = random_video(frames, 16, 40)
    expected = peer.encode(video).latent_dist
    moments = ours.moments(video)
    assert relative_error(moments[0], expected.mean) <= 1e-5
    assert relative_error(moments[1], expected.logvar) <= 1e-5
    mean, std = statistics_of(peer)
    assert relative_error(ours.encode(video), (expected.mode() - mean) / std) <= 1e-5


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
@pytest.mark.parametrize("sizes", SIZES)
def test_decoder(sizes: dict[str, Any], frames: int) -> None:
    ours, peer = build_pair(**sizes)
    latent = random_latent(ours, frames, 2, 5)
    mean, std = statistics_of(peer)
    expected = peer.decode(latent * std + mean, return_dict=False)[0]
    stride = 2 ** sum((VAE_SIZES | sizes)["temperal_downsample"])
    assert expected.shape[2] == (frames - 1) * stride + 1
    assert relative_error(ours.decode(latent), expected) <= 1e-5


def test_81_frames() -> None:
    ours, peer = build_pair(base_dim=2)
    video = random_video(81, 16, 8)
    expected = peer.encode(video).latent_dist.mode()
    mean, std = statistics_of(peer)
    latent = ours.encode(video)
    assert latent.shape[2] == 21
    assert relative_error(latent, (expected - mean) / std) <= 1e-5
    decoded = peer.decode(latent * std + mean, return_dict=False)[0]
    assert decoded.shape == video.shape
    assert relative_error(ours.decode(latent), decoded) <= 1e-5


@pytest.mark.parametrize("sizes", SIZES)
def test_streamed_encoding_equals_one_shot(sizes: dict[str, Any]) -> None:
    ours, _ = build_pair(**sizes)
    video = random_video(17, 16, 24)
    past, parts = None, []
    for chunk in video.split([1, 4, 4, 4, 4], dim=2):
        history = History(past)
        parts.append(ours.encode(chunk, history))
        past = history.kept
    assert relative_error(torch.cat(parts, dim=2), ours.encode(video)) <= 1e-5


@pytest.mark.parametrize("chunks", [[1, 1, 1, 1, 1], [1, 4], [2, 3], [1, 2, 2], [5]])
@pytest.mark.parametrize("sizes", SIZES)
def test_streamed_decoding_equals_one_shot(sizes: dict[str, Any], chunks: list[int]) -> None:
    ours, _ = build_pair(**sizes)
    latent = random_latent(ours, 5, 2, 3)
    past, parts, kept = None, [], []
    for chunk in latent.split(chunks, dim=2):
        history = History(past)
        parts.append(ours.decode(chunk, history))
        past = history.kept
        kept.append([cache.shape for cache in past])
    assert relative_error(torch.cat(parts, dim=2), ours.decode(latent)) <= 1e-5
    # Constant memory: the past of every layer keeps its size.
    assert all(shapes == kept[0] for shapes in kept)


def test_number_of_caches_as_published() -> None:
    """The temporal layers of Wan2.1: 32 in the decoder and 24 in the encoder."""
    ours, _ = build_pair(base_dim=2, dim_mult=[1, 2, 4, 4], num_res_blocks=2)
    decoding, encoding = History(), History()
    ours.decode(random_latent(ours, 1, 1, 1), decoding)
    ours.encode(random_video(1, 8, 8), encoding)
    assert (len(decoding.kept), len(encoding.kept)) == (32, 24)


def test_decoded_pixels_are_clamped() -> None:
    ours, _ = build_pair()
    ours.decoder.head["2"].bias.fill_(10.0)
    video = ours.decode(random_latent(ours, 1, 2, 2))
    assert torch.equal(video, torch.ones_like(video))


def test_the_past_matters() -> None:
    """A stream that forgets its past is not the clip."""
    ours, _ = build_pair()
    latent = random_latent(ours, 3, 2, 3)
    history = History()
    ours.decode(latent[:, :, :1], history)
    forgotten = [torch.zeros_like(cache) for cache in history.kept]
    rest = ours.decode(latent[:, :, 1:], History(history.kept))
    assert relative_error(ours.decode(latent[:, :, 1:], History(forgotten)), rest) > 1e-3
