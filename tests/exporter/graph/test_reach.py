"""Borders of tiles against gradients: what an output depends on has a derivative that is not 0."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
import pytest
import torch

from tests.support.peers import randomise
from wanx.config.models import PRESETS
from wanx.errors import WanxError
from wanx.exporter.components import vae_decoder_specs, vae_encoder_specs
from wanx.exporter.graph.reach import reach, tile_border
from wanx.exporter.graph.trace import trace
from wanx.models.vae import History, WanVAE

TINY = replace(PRESETS["tiny"].vae, base_dim=4)
CONFIGS = {
    "two blocks": TINY,
    "one block": replace(TINY, num_res_blocks=1),
    "three levels": replace(TINY, multipliers=(1, 2, 2), temporal_downsample=(True, False)),
}


def footprint(gradient: torch.Tensor) -> tuple[int, int, int, int]:
    """First and last row, then column, in which a gradient ``[..., H, W]`` is not 0."""
    seen = gradient.abs().flatten(0, -3).amax(0) > 0
    rows, columns = seen.any(1).nonzero().flatten(), seen.any(0).nonzero().flatten()
    return int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chunk", [0, 1])
def test_decoders(name: str, chunk: int) -> None:
    config = CONFIGS[name]
    spec = vae_decoder_specs(config)[2 + chunk]
    found = reach(trace(spec), "features", "video", config.spatial_stride)
    side, place = 2 * found.border + 5, found.border + 2
    vae = randomise(WanVAE(config), seed=0)
    features = torch.randn(1, config.base_dim * config.multipliers[-1], 1 + chunk, side, side)
    video = vae.decode_up(features.requires_grad_(), History(keep=False))
    scale = config.spatial_stride
    inner = slice(place * scale, (place + 1) * scale)
    video[..., inner, inner].sum().backward()
    assert features.grad is not None
    top, bottom, left, right = footprint(features.grad)
    assert (place - top, bottom - place) == found.rows
    assert (place - left, right - place) == found.columns
    assert tile_border(spec.name, trace(spec), scale) == found.border


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chunk", [0, 1])
def test_encoders(name: str, chunk: int) -> None:
    config = CONFIGS[name]
    spec, scale = vae_encoder_specs(config)[chunk], config.spatial_stride
    found = reach(trace(spec), "video", "features", 1 / scale)
    border = -(-found.border // scale)
    side, place = (2 * border + 3) * scale, border + 1
    vae = randomise(WanVAE(config), seed=0)
    video = torch.randn(1, 3, 1 + chunk * config.temporal_stride, side, side)
    features = vae.encode_down(video.requires_grad_(), History(keep=False))
    features[..., place, place].sum().backward()
    assert video.grad is not None
    top, bottom, left, right = footprint(video.grad)
    first, last = place * scale, (place + 1) * scale - 1
    assert (first - top, bottom - last) == found.rows
    assert (first - left, right - last) == found.columns
    assert tile_border(spec.name, trace(spec), scale) == border


@pytest.mark.parametrize("name", ["vae_decoder_mid_rest", "vae_encoder_mid_first", "dit"])
def test_parts_that_need_whole_frames(name: str) -> None:
    assert tile_border(name, ir.Model(ir.Graph([], [], nodes=[]), ir_version=10), 8) is None


def test_what_mixes_places_is_refused() -> None:
    model = trace(vae_decoder_specs(TINY)[0])  # attends
    with pytest.raises(WanxError, match="mixes places of a frame"):
        reach(model, "latent", "features", 1)
