from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from interpreter import DEVICE
from torch import Tensor
from torch.nn import functional as F

from wanx.kernels.attention_8bit import attention_8bit_reference, launch_attention_8bit
from wanx.kernels.attention_providers import Provider, choose
from wanx.kernels.flash_attention import launch_attention, unsupported_shapes

# batch, heads, head, queries, keys: fewer than a block, one more than it, exactly one, tails of Wan
SIZES = [
    (1, 2, 16, 5, 7),
    (2, 3, 64, 129, 257),
    (1, 2, 128, 128, 128),
    (1, 1, 128, 80, 376),
    (1, 1, 32, 120, 1),
]
HALVES = [torch.bfloat16, torch.float16]


def operands(size: tuple[int, ...], dtype: torch.dtype, offset: float = 0) -> list[Tensor]:
    """q, k and v; k and v are halves of longer rows. One channel of k lies far from zero."""
    batch, heads, head, queries, keys = size
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, queries, heads * head, generator=generator)
    kv = torch.randn(batch, keys, 2 * heads * head, generator=generator)
    kv[..., 3] += offset
    return [q.to(dtype), *kv.to(dtype).chunk(2, -1)]


def exact(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    split = [t.double().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v)]
    return F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(-2)


def on_device(tensors: list[Tensor]) -> list[Tensor]:
    q, k, v = tensors
    return [q.to(DEVICE), *torch.cat([k, v], -1).to(DEVICE).chunk(2, -1)]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", SIZES)
def test_sixteen_bits(size: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors, heads = operands(size, dtype), size[1]
    out = launch_attention(*on_device(tensors), heads, size[2] ** -0.5).cpu()
    assert out.dtype == dtype
    # Weights are rounded to the dtype, relative to the largest, and so is the result.
    bound = 3 * torch.finfo(dtype).eps
    error = (out.double() - exact(*tensors, heads)).abs().max() / tensors[2].abs().max().double()
    assert error <= bound


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", SIZES)
def test_eight_bits(size: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors, heads = operands(size, dtype, offset=8), size[1]
    out = launch_attention_8bit(*on_device(tensors), heads, size[2] ** -0.5).cpu()
    wanted = exact(*tensors, heads)
    reference = attention_8bit_reference(*tensors, heads, size[2] ** -0.5)
    for found in (out, reference):
        cosine = torch.cosine_similarity(found.double().flatten(), wanted.flatten(), 0)
        assert cosine >= 0.999
    cosine = torch.cosine_similarity(out.double().flatten(), reference.double().flatten(), 0)
    assert cosine >= 0.9997


@pytest.mark.parametrize("launch", [launch_attention, launch_attention_8bit])
def test_large_scores_do_not_overflow(launch: Callable[..., Tensor]) -> None:
    q, k, v = operands((1, 1, 16, 9, 40), torch.bfloat16)
    out = launch(*on_device([q * 60, k * 60, v]), 1, 1.0).cpu()
    assert out.isfinite().all()
    cosine = torch.cosine_similarity(
        out.double().flatten(), exact(q * 240, k * 60, v, 1).flatten(), 0
    )
    assert cosine >= 0.97  # one key takes it all; 8 bits may pick another of two close ones


def test_shapes_that_do_not_run() -> None:
    q, k, v = (torch.empty(1, n, 96) for n in (4, 6, 6))
    assert unsupported_shapes(q, k, v, 6) is None
    assert "48" in (unsupported_shapes(q, k, v, 2) or "")
    assert "[1, 4, 96]" in (unsupported_shapes(q, k, q, 6) or "")


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a provider")
def test_the_processor_has_none() -> None:
    found = choose(*operands(SIZES[0], torch.bfloat16), 2, bits=8)
    assert not isinstance(found, Provider)
    assert "not on cpu" in found
