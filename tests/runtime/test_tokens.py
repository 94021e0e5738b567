"""Token layout and rotary tables against torch's convolution and diffusers' transformer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.transformers import transformer_wan
from numpy.typing import NDArray

from wanx.config.models import PRESETS, DiTConfig
from wanx.runtime.tokens import patchify, rope_tables, token_grid, unpatchify

Triple = tuple[int, int, int]
GRIDS: list[Triple] = [(1, 1, 1), (3, 2, 5), (2, 7, 3), (5, 1, 4)]
PATCHES: list[Triple] = [(1, 2, 2), (2, 1, 3), (1, 1, 1)]


def random(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("channels", [1, 16, 36])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("patch", PATCHES)
def test_patchify_turns_the_convolution_into_a_linear(
    channels: int, grid: Triple, patch: Triple
) -> None:
    latent = random(channels, *(g * p for g, p in zip(grid, patch, strict=True)))
    weight = torch.from_numpy(random(11, channels, *patch))
    tokens = patchify(latent, patch)
    assert tokens.shape == (np.prod(grid), channels * np.prod(patch))
    assert tokens.dtype == np.float32
    assert tokens.flags.c_contiguous
    convolved = torch.nn.functional.conv3d(torch.from_numpy(latent), weight, stride=patch)
    expected = convolved.flatten(1).T
    actual = torch.from_numpy(tokens) @ weight.flatten(1).T
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("patch", [(1, 2, 2), (1, 1, 2)])
def test_unpatchify_equals_the_end_of_diffusers(grid: Triple, patch: Triple) -> None:
    """Run its whole transformer, catch what its head wrote, and assemble that ourselves."""
    torch.manual_seed(0)
    model = transformer_wan.WanTransformer3DModel(
        patch_size=patch, num_attention_heads=1, attention_head_dim=12, in_channels=4,
        out_channels=3, text_dim=8, freq_dim=8, ffn_dim=16, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip
    written: list[torch.Tensor] = []
    model.proj_out.register_forward_hook(lambda _module, _args, output: written.append(output))
    sizes = [g * p for g, p in zip(grid, patch, strict=True)]
    with torch.no_grad():
        video = model(
            hidden_states=torch.from_numpy(random(1, 4, *sizes)),
            timestep=torch.tensor([500]),
            encoder_hidden_states=torch.from_numpy(random(1, 6, 8)),
        ).sample
    latent = unpatchify(written[0][0].numpy(), grid, patch)
    assert latent.flags.c_contiguous
    np.testing.assert_array_equal(latent, video[0].numpy())


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("patch", PATCHES)
def test_unpatchify_inverts_patchify_up_to_feature_order(grid: Triple, patch: Triple) -> None:
    latent = random(5, *(g * p for g, p in zip(grid, patch, strict=True)))
    channel_first = patchify(latent, patch).reshape(-1, 5, int(np.prod(patch)))
    channel_last = channel_first.transpose(0, 2, 1).reshape(len(channel_first), -1)
    np.testing.assert_array_equal(unpatchify(channel_last, grid, patch), latent)


@pytest.mark.parametrize("shape", [(4, 1, 3, 4), (4, 1, 4, 5), (4, 3, 2, 2)])
def test_patch_must_divide(shape: tuple[int, ...]) -> None:
    patch = (2, 2, 2) if shape[1] == 3 else (1, 2, 2)
    with pytest.raises(ValueError, match="does not divide"):
        patchify(np.zeros(shape, np.float32), patch)
    with pytest.raises(ValueError, match="does not divide"):
        token_grid(shape, patch)


def test_tokens_must_fill_the_grid() -> None:
    with pytest.raises(ValueError, match="8 tokens do not fill the grid"):
        unpatchify(np.zeros((8, 64), np.float32), (1, 2, 2))


@pytest.mark.parametrize("grid", [*GRIDS, (21, 30, 52)])
@pytest.mark.parametrize("config", [PRESETS["t2v-14B"].dit, PRESETS["tiny"].dit])
def test_rope_equals_diffusers(grid: Triple, config: DiTConfig) -> None:
    patch = config.patch_size
    peer = transformer_wan.WanRotaryPosEmbed(config.head_dim, patch, 1024)
    sizes = [g * p for g, p in zip(grid, patch, strict=True)]
    theirs: list[Any] = [table[0, :, 0].numpy() for table in peer(torch.zeros(1, 1, *sizes))]
    for ours, doubled in zip(rope_tables(grid, config.rope_dims), theirs, strict=True):
        assert ours.dtype == np.float32
        assert ours.shape == (np.prod(grid), config.head_dim // 2)
        np.testing.assert_allclose(ours, doubled[:, ::2], rtol=0, atol=1.2e-7)
        np.testing.assert_array_equal(doubled[:, ::2], doubled[:, 1::2])


@pytest.mark.parametrize("dims", [(44, 42, 42), (4, 2, 2), (2, 6, 4)])
def test_rope_is_a_rotation_by_position(dims: Triple) -> None:
    """The textbook form: pair k of axis a is multiplied by exp(i · p_a · theta^(-2k/d_a))."""
    grid, theta = (2, 3, 4), 500.0
    cos, sin = rope_tables(grid, dims, theta)
    token = 0
    for positions in np.ndindex(grid):
        turns = [
            np.exp(1j * p / theta ** (2 * k / d))
            for p, d in zip(positions, dims, strict=True)
            for k in range(d // 2)
        ]
        np.testing.assert_allclose(cos[token] + 1j * sin[token], turns, atol=1.2e-7)
        token += 1
    assert token == len(cos)
