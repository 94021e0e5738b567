"""The transformer against diffusers', with the same weights through our own key map."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.peers import DIT_SIZES, copy_weights, random_dit, relative_error
from wanx.checkpoints.key_maps import DIT
from wanx.config.models import PRESETS, DiTConfig
from wanx.models.dit.embeddings import TimeEmbedding
from wanx.models.dit.model import WanDiT
from wanx.runtime.tokens import patchify, rope_tables, token_grid, unpatchify

TEXT_LENGTH = 11
IMAGE = {"in_channels": 36, "image_dim": 20}
# (frames, height, width) of the latent; 1, 7, 45, 198 and, for a video of 81 frames, 63 tokens.
LATENTS = [(1, 2, 2), (1, 2, 14), (3, 6, 10), (2, 18, 22), (21, 2, 6)]
WIDTHS = [
    {"num_attention_heads": 3, "attention_head_dim": 24},
    {"num_attention_heads": 1, "attention_head_dim": 128},
    {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 7, "text_dim": 13},
    # The three axes share the features unevenly: 6 + 4 + 4.
    {"num_attention_heads": 5, "attention_head_dim": 14, "freq_dim": 6, "num_layers": 3},
]


def build_pair(seed: int = 0, **sizes: Any) -> tuple[WanDiT, Any]:
    """Our network and diffusers', with equal weights."""
    sizes = DIT_SIZES | sizes
    heads = sizes["num_attention_heads"]
    dim = heads * sizes["attention_head_dim"]
    if "image_dim" in sizes:
        sizes["added_kv_proj_dim"] = dim
    positions = sizes.get("pos_embed_seq_len")
    image: dict[str, Any] = {}
    if positions is not None:
        image = {"image_frames": 2, "image_tokens": positions // 2}
    elif "image_dim" in sizes:
        image = {"image_tokens": 7}
    vace = {
        ours: sizes[theirs]
        for ours, theirs in (("vace_layers", "vace_layers"), ("vace_in_dim", "vace_in_channels"))
        if theirs in sizes
    }
    peer = random_dit(seed, vace=bool(vace), **sizes)
    config = DiTConfig(
        dim=dim,
        num_heads=heads,
        in_dim=sizes.get("in_channels", 16),
        image_dim=sizes.get("image_dim"),
        **{key: sizes[key] for key in ("ffn_dim", "num_layers", "freq_dim", "text_dim")},
        **image,
        **vace,
    )
    ours = copy_weights(WanDiT(config), peer, DIT)
    assert isinstance(ours, WanDiT)
    return ours, peer


def random_inputs(config: DiTConfig, latent: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """A latent [1, C, T, h, w] and padded text features."""
    torch.manual_seed(1)
    # Where there are images, diffusers finds them by a text length that it takes to be 512.
    length = TEXT_LENGTH if config.image_dim is None else 512
    context = torch.randn(1, length, config.text_dim)
    context[:, TEXT_LENGTH // 2 :] = 0
    return torch.randn(1, config.in_dim, *latent), context


def run_ours(
    ours: WanDiT, latent: Tensor, timestep: float, context: Tensor, **extra: Tensor
) -> Tensor:
    """Predict a velocity as the runtime does: numpy cuts the latent into tokens and joins them."""
    config = ours.config
    cells = latent[0].numpy()
    grid = token_grid(cells.shape, config.patch_size)
    cos, sin = map(torch.from_numpy, rope_tables(grid, config.rope_dims))
    tokens = torch.from_numpy(patchify(cells, config.patch_size))[None]
    time = torch.tensor([timestep])
    velocity = ours(tokens, time, context, cos, sin, **extra)
    assert velocity.dtype == torch.float32
    return torch.from_numpy(unpatchify(velocity[0].numpy(), grid, config.patch_size))[None]


def run_peer(
    peer: Any, latent: Tensor, timestep: float, context: Tensor, **extra: Tensor
) -> Tensor:
    out: Tensor = peer(latent, torch.tensor([timestep]), context, return_dict=False, **extra)[0]
    return out


@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("sizes", WIDTHS)
def test_text_to_video(sizes: dict[str, Any], latent: tuple[int, int, int]) -> None:
    ours, peer = build_pair(**sizes)
    x, context = random_inputs(ours.config, latent)
    expected = run_peer(peer, x, 500.0, context)
    assert relative_error(run_ours(ours, x, 500.0, context), expected) <= 1e-5


@pytest.mark.parametrize("timestep", [0.0, 1.0, 37.0, 999.0, 1000.0])
def test_timesteps(timestep: float) -> None:
    """diffusers rounds the angles to fp32, so it is the less exact at large timesteps."""
    ours, peer = build_pair()
    x, context = random_inputs(ours.config, (1, 4, 6))
    expected = run_peer(peer, x, timestep, context)
    assert relative_error(run_ours(ours, x, timestep, context), expected) <= 1e-4


@pytest.mark.parametrize("freq_dim", [6, 128, 256])
def test_time_embedding_is_exact(freq_dim: int) -> None:
    """The sinusoids have float64's quality at every timestep a sampler can give."""
    embedding = TimeEmbedding(freq_dim, freq_dim)
    for index in (0, 2):
        torch.nn.init.eye_(embedding[index].weight)
        torch.nn.init.zeros_(embedding[index].bias)
    timesteps = torch.arange(1001)
    angles = timesteps.double()[:, None] * 10000.0 ** (
        -torch.arange(freq_dim // 2, dtype=torch.float64) / (freq_dim // 2)
    )
    expected = torch.nn.functional.silu(torch.cat([angles.cos(), angles.sin()], dim=-1))
    with torch.no_grad():
        out = embedding(timesteps.float())
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=5e-7)


@pytest.mark.parametrize("latent", LATENTS[1:3])
def test_image_to_video(latent: tuple[int, int, int]) -> None:
    ours, peer = build_pair(**IMAGE)
    x, context = random_inputs(ours.config, latent)
    image = torch.randn(1, 7, 20)
    expected = run_peer(peer, x, 300.0, context, encoder_hidden_states_image=image)
    out = run_ours(ours, x, 300.0, context, image_context=image)
    assert relative_error(out, expected) <= 1e-5
    # The image matters: another one gives another velocity.
    other = run_ours(ours, x, 300.0, context, image_context=image.flip(-1))
    assert relative_error(other, expected) > 1e-2


@pytest.mark.parametrize("latent", LATENTS[1:3])
def test_first_and_last_frame_to_video(latent: tuple[int, int, int]) -> None:
    """diffusers takes the two images as a batch and joins them where it adds their positions."""
    ours, peer = build_pair(**IMAGE, pos_embed_seq_len=10)
    x, context = random_inputs(ours.config, latent)
    images = torch.randn(2, 5, 20)
    expected = run_peer(peer, x, 300.0, context, encoder_hidden_states_image=images)
    joined = images.reshape(1, 10, 20)
    out = run_ours(ours, x, 300.0, context, image_context=joined)
    assert relative_error(out, expected) <= 1e-5
    swapped = run_ours(ours, x, 300.0, context, image_context=joined.flip(1))
    assert relative_error(swapped, expected) > 1e-2


@pytest.mark.parametrize("layers", [(0,), (0, 2), (0, 1, 2, 3)])
@pytest.mark.parametrize("latent", LATENTS[1:3])
def test_vace(latent: tuple[int, int, int], layers: tuple[int, ...]) -> None:
    ours, peer = build_pair(num_layers=4, vace_layers=layers, vace_in_channels=40)
    x, context = random_inputs(ours.config, latent)
    control = torch.randn(1, 40, *latent)
    scale = torch.linspace(0.5, 1.5, len(layers))
    expected = run_peer(
        peer, x, 300.0, context, control_hidden_states=control, control_hidden_states_scale=scale
    )
    tokens = torch.from_numpy(patchify(control[0].numpy()))[None]
    out = run_ours(ours, x, 300.0, context, vace_tokens=tokens, vace_scale=scale)
    assert relative_error(out, expected) <= 1e-5
    without = run_ours(ours, x, 300.0, context, vace_tokens=tokens, vace_scale=scale * 0)
    assert relative_error(without, expected) > 1e-2


def test_text_padding_is_attended() -> None:
    """Wan attends to the zero rows behind the text, so their number matters."""
    ours, peer = build_pair()
    x, context = random_inputs(ours.config, (1, 4, 6))
    shorter = context[:, :-3]
    expected = run_peer(peer, x, 500.0, context)
    assert relative_error(run_ours(ours, x, 500.0, context), expected) <= 1e-5
    assert relative_error(run_ours(ours, x, 500.0, shorter), expected) > 1e-3


def test_a_batch_is_its_samples() -> None:
    ours, _ = build_pair()
    latents, contexts, timesteps = [], [], (900.0, 20.0)
    for _ in timesteps:
        latents.append(torch.randn(1, 16, 2, 6, 4))
        contexts.append(torch.randn(1, TEXT_LENGTH, ours.config.text_dim))
    cells = [patchify(latent[0].numpy()) for latent in latents]
    grid = token_grid(latents[0].shape[1:])
    cos, sin = map(torch.from_numpy, rope_tables(grid, ours.config.rope_dims))
    out = ours(
        torch.from_numpy(np.stack(cells)), torch.tensor(timesteps), torch.cat(contexts), cos, sin
    )
    for i, timestep in enumerate(timesteps):
        alone = run_ours(ours, latents[i], timestep, contexts[i])
        joined = unpatchify(out[i].numpy(), grid)
        assert relative_error(joined[None], alone) <= 1e-5


def test_bf16_linears_keep_an_fp32_stream() -> None:
    """With weights in bf16 the velocity is fp32 and as near to the exact one as bf16 allows."""
    ours, _ = build_pair(num_layers=3)
    x, context = random_inputs(ours.config, (2, 6, 10))
    exact = run_ours(ours, x, 500.0, context)
    rough = run_ours(ours.to(torch.bfloat16), x, 500.0, context)
    cosine = torch.nn.functional.cosine_similarity(rough.flatten(), exact.flatten(), dim=0)
    assert cosine > 0.999


@pytest.mark.parametrize("name", PRESETS)
def test_rope_dimensions_of_presets(name: str) -> None:
    """The three axes fill a head exactly, in pairs; published: 44, 42, 42."""
    dit = PRESETS[name].dit
    assert sum(dit.rope_dims) == dit.head_dim
    assert all(dim % 2 == 0 for dim in dit.rope_dims)
    if not name.startswith("tiny"):
        assert dit.rope_dims == (44, 42, 42)


def test_every_weight_matters() -> None:
    """No parameter of the network is ignored: each one changes the velocity."""
    ours, _ = build_pair(num_layers=1, ffn_dim=10)
    x, context = random_inputs(ours.config, (1, 4, 4))
    before = run_ours(ours, x, 500.0, context)
    for name, parameter in ours.named_parameters():
        kept = parameter.clone()
        parameter.add_(torch.randn_like(parameter) * 0.1)
        changed = relative_error(run_ours(ours, x, 500.0, context), before)
        parameter.copy_(kept)
        # Softmax ignores a constant added to all scores: the bias of k and nothing else.
        assert changed > 1e-5 or name.endswith(".k.bias"), name
