"""Tiles of the VAE's parts give what whole frames give."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from tests.support.components import Float32, run_vae_decoder, run_vae_encoder
from tests.support.peers import relative_error
from wanx.bundle.reader import Bundle
from wanx.runtime.output.frame_checks import frames_to_uint8
from wanx.runtime.run_parts import RunParts

SIZES = [(40, 33), (29, 48), (31, 31), (8, 64), (64, 8)]


def random(*shape: int) -> Float32:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def bordered(bundle: Bundle, part: str, border: int) -> Bundle:
    """A bundle that knows another border of a part."""
    manifest = bundle.manifest
    components = {
        name: record.model_copy(update={"tile_border": border}) if part in name else record
        for name, record in manifest.components.items()
    }
    return dataclasses.replace(
        bundle, manifest=manifest.model_copy(update={"components": components})
    )


def area_of(bundle: Bundle, part: str, size: tuple[int, int]) -> int:
    """Places of a tile that cuts a side, or both where both are long enough."""
    border = bundle.manifest.components[f"{part}_rest"].tile_border
    assert border is not None
    return int(np.prod([min(side, max(1 + 2 * border, side - 4)) for side in size]))


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_decoded_tiles(size: tuple[int, int], times: int, bundle_fp32: Bundle) -> None:
    area = area_of(bundle_fp32, "vae_decoder_up", size)
    parts = dataclasses.replace(RunParts.of(bundle_fp32), tile_area=area)
    assert parts.vae_plan("vae_decoder_up", (times, *size)).in_tiles
    latent = random(16, times, *size)
    whole = run_vae_decoder(bundle_fp32, latent)
    tiled = run_vae_decoder(bundle_fp32, latent, area)
    assert relative_error(tiled, whole) <= 1e-5
    pixels = [frames_to_uint8(video) for video in (whole, tiled)]
    assert np.mean(pixels[0] == pixels[1]) >= 0.9999


@pytest.mark.parametrize("frames", [1, 9])
@pytest.mark.parametrize("size", SIZES)
def test_encoded_tiles(
    size: tuple[int, int], frames: int, bundle_of: Callable[..., Bundle]
) -> None:
    bundle = bundle_of("i2v", "fp32")
    area = area_of(bundle, "vae_encoder_down", size)
    parts = dataclasses.replace(RunParts.of(bundle), tile_area=area)
    assert parts.vae_plan("vae_encoder_down", (1, *size)).in_tiles
    video = random(3, frames, 8 * size[0], 8 * size[1]).clip(-1, 1)
    whole = run_vae_encoder(bundle, video)
    assert relative_error(run_vae_encoder(bundle, video, area), whole) <= 1e-5


def test_a_border_that_is_too_small(bundle_fp32: Bundle) -> None:
    """Far from the border's outermost places what is wrong is more than rounding."""
    border = bundle_fp32.manifest.components["vae_decoder_up_rest"].tile_border
    assert border is not None
    latent = random(16, 2, 4, 2 * border + 8)
    whole = run_vae_decoder(bundle_fp32, latent)
    narrow = bordered(bundle_fp32, "vae_decoder_up", 4)
    assert relative_error(run_vae_decoder(narrow, latent, 4 * (border + 4)), whole) > 1e-4
