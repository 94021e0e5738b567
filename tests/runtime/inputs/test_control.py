"""VACE's arithmetic against torch, Diffusers, exact fractions and the definitions written out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanVACEPipeline
from numpy.typing import NDArray

from wanx.runtime.inputs.control import (
    mask_latent,
    mask_values,
    sample_frames,
    split_by_mask,
    with_references,
)

RNG = np.random.default_rng(0)


def floats(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape, dtype=np.float32)


def unit(*shape: int) -> NDArray[np.float32]:
    return RNG.random(shape, dtype=np.float32)


def ids_by_definition(times: NDArray[Any], count: int) -> list[int]:
    """Every moment compared with every frame, one after the other."""
    ids = []
    for moment in np.linspace(
        0.0, float((times[-1, 0] + times[-1, 1]) / times.dtype.type(2)), count
    ):
        seen = [i for i, (start, end) in enumerate(times) if start <= moment <= end]
        begun = [i for i, (start, _) in enumerate(times) if start <= moment] or [0]
        ids.append(seen[0] if seen else begun[-1])
    return ids


def adjoining(starts: NDArray[np.float64], last: float) -> NDArray[np.float64]:
    return np.stack([starts, np.append(starts[1:], starts[-1] + last)], axis=1)


def test_sample_frames_of_evenly_spaced_ones() -> None:
    rounding_matters = 0
    for rate in (15, 16, 24, 25, 29.97, 30, 60):
        for frames in (1, 2, 8, 23, 81, 100):
            times = adjoining(np.arange(frames) / rate, 1 / rate)
            for count in (1, 5, 21, 81, 2 * frames):  # some moments where two frames meet
                ids = sample_frames(times, count)
                assert ids == ids_by_definition(times.astype(np.float32), count)
                assert (ids[0], ids[-1]) == (0, frames - 1 if count > 1 else 0)
                rounding_matters += ids != ids_by_definition(times, count)
    assert rounding_matters > 0  # so float64 would fail


def test_sample_frames_of_others() -> None:
    for _ in range(100):
        starts = np.cumsum(RNG.exponential(0.1, int(RNG.integers(1, 60))))
        times = adjoining(starts - starts[0], 0.1)
        for kept in (1.0, 0.5):  # with half of every frame's duration there are gaps
            times[:, 1] = times[:, 0] + kept * (times[:, 1] - times[:, 0])
            count = int(RNG.integers(1, 120))
            ids = sample_frames(times, count)
            assert ids == ids_by_definition(times.astype(np.float32), count)
            assert all(type(number) is int for number in ids)


@pytest.mark.parametrize(
    ("times", "count", "ids"),
    [
        # 0, 0.7, 1.4, 2.1, 2.8, 3.5
        ([[0, 1], [1, 2], [2, 3], [3, 4]], 6, [0, 0, 1, 2, 2, 3]),
        # 0, 1, 2, 3: the frame that ends there is seen, not the one that begins.
        ([[0, 1], [1, 2], [2, 4]], 4, [0, 0, 1, 2]),
        # 0, 2.25, 4.5 and 6.75, 9 with a gap from 1 to 4 and from 5 to 8
        ([[0, 1], [4, 5], [8, 10]], 5, [0, 0, 1, 1, 2]),
        # 0, 4, 8 with the second just where a frame begins after a gap
        ([[0, 1], [4, 5], [7, 9]], 3, [0, 1, 2]),
        # 0, 4.5, 9 with nothing before 3
        ([[3, 4], [4, 8], [8, 10]], 3, [0, 1, 2]),
    ],
)
def test_sample_frames(times: list[list[float]], count: int, ids: list[int]) -> None:
    assert sample_frames(np.array(times), count) == ids


def test_mask_values_are_those_of_torch() -> None:
    pixels = RNG.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    pixels[0, ..., 0] = np.arange(256).reshape(16, 16)
    expected = torch.from_numpy(pixels)[..., 0].float().div_(127.5).sub_(1.0)
    expected = torch.clamp((expected + 1) / 2, 0, 1)
    values = mask_values(pixels)
    assert values.dtype == np.float32
    assert np.array_equal(values, expected.numpy())


def test_split_by_mask() -> None:
    video, mask = floats(3, 2, 4, 6), unit(2, 4, 6)
    mask[0, 0, :3] = 0.5, np.nextafter(np.float32(0.5), np.float32(1)), 1
    inactive, reactive = split_by_mask(video, mask)
    chosen = torch.where(torch.from_numpy(mask) > 0.5, 1.0, 0.0)
    assert chosen[0, 0, :3].tolist() == [0, 1, 1]
    assert inactive.dtype == reactive.dtype == np.float32
    assert np.array_equal(inactive, (torch.from_numpy(video) * (1 - chosen)).numpy())
    assert np.array_equal(reactive, (torch.from_numpy(video) * chosen).numpy())


def torch_mask_latent(mask: NDArray[np.float32], frames: int, stride: int) -> NDArray[np.float32]:
    # pixel_unshuffle takes [F, 1, H, W] to [F, stride², H / stride, W / stride].
    cells = torch.nn.functional.pixel_unshuffle(torch.from_numpy(mask)[:, None], stride)
    cells = cells.transpose(0, 1)[None]
    size = (frames, *cells.shape[-2:])
    nearest = torch.nn.functional.interpolate(cells, size=size, mode="nearest-exact")
    return nearest[0].numpy()


@pytest.mark.parametrize("stride", [8, 4])
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 6, 8, 9, 13, 17, 81, 100, 117])
def test_mask_latent_is_that_of_torch(frames: int, stride: int) -> None:
    mask = unit(frames, 24, 40)
    for latent_frames in {(frames + 3) // 4, frames, (frames + 1) // 2, 2 * frames}:
        latent = mask_latent(mask, latent_frames, stride)
        assert latent.shape == (stride**2, latent_frames, 24 // stride, 40 // stride)
        assert latent.dtype == np.float32
        assert np.array_equal(latent, torch_mask_latent(mask, latent_frames, stride))


def test_references_come_first() -> None:
    latents, mask = floats(8, 3, 2, 5), unit(9, 3, 2, 5)
    references = [floats(4, 1, 2, 5) for _ in range(3)]
    made = with_references(latents, references, mask)
    assert made.shape == (17, 6, 2, 5)
    assert made.dtype == np.float32
    for time, reference in enumerate(references):
        assert np.array_equal(made[:4, time], reference[:, 0])
    assert not made[4:, :3].any()
    assert np.array_equal(made[:8, 3:], latents)
    assert np.array_equal(made[8:, 3:], mask)
    assert np.array_equal(with_references(latents, [], mask), np.concatenate([latents, mask]))


class FakeVAE:
    """Encodes by keeping every eighth pixel of every fourth frame, in four shades of a channel."""

    dtype = torch.float32
    config = SimpleNamespace(z_dim=12, latents_mean=[0.0] * 12, latents_std=[1.0] * 12)

    def encode(self, video: torch.Tensor) -> SimpleNamespace:
        kept = video[:, :, ::4, ::8, ::8]
        return SimpleNamespace(latents=torch.cat([kept, kept / 2, kept / 4, kept / 8], dim=1))


@pytest.mark.parametrize("references", [0, 1])  # Diffusers reverses the order of several
@pytest.mark.parametrize("frames", [1, 5, 17])
def test_the_whole_condition_is_that_of_diffusers(frames: int, references: int) -> None:
    peer: Any = SimpleNamespace(
        vae=FakeVAE(),
        transformer=SimpleNamespace(config=SimpleNamespace(patch_size=(1, 2, 2))),
        vae_scale_factor_temporal=4,
        vae_scale_factor_spatial=8,
    )
    video, mask = floats(3, frames, 32, 48), unit(frames, 32, 48)
    images = [floats(3, 32, 48) for _ in range(references)]
    as_peers = [[torch.from_numpy(image) for image in images]]
    masks = torch.from_numpy(mask).expand(1, 3, -1, -1, -1)
    expected = torch.cat(
        [
            WanVACEPipeline.prepare_video_latents(
                peer, torch.from_numpy(video)[None], masks, as_peers, device=torch.device("cpu")
            ),
            WanVACEPipeline.prepare_masks(peer, masks.contiguous(), as_peers),
        ],
        dim=1,
    )

    def encode(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        latent: NDArray[np.float32] = (
            peer.vae.encode(torch.from_numpy(pixels)[None]).latents[0].numpy()
        )
        return latent

    latents = np.concatenate([encode(half) for half in split_by_mask(video, mask)])
    made = with_references(
        latents, [encode(image[:, None]) for image in images], mask_latent(mask, (frames + 3) // 4)
    )
    assert np.array_equal(made, expected[0].numpy())
