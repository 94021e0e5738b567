"""The numpy noise is torch's: the oracle is a torch CPU generator with the same seed."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from wanx.errors import UsageError
from wanx.runtime.sampling.noise import TorchGenerator, randn

SEEDS = [0, 1, 42, 2**31, 2**32 - 1, 2**32 + 5, 2**63 - 1, 2**64 - 1, -1, -(2**63)]
VECTORISED = sys.platform == "linux" and torch.backends.cpu.get_cpu_capability() in {
    "AVX2",
    "AVX512",
}


def torch_generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def assert_same_noise(actual: NDArray[np.float32], expected: torch.Tensor) -> None:
    assert actual.dtype == np.float32
    assert actual.shape == tuple(expected.shape)
    if VECTORISED or actual.size < 16:
        np.testing.assert_array_equal(actual, expected.numpy())
    else:  # torch itself is this far from its own vectorised path
        np.testing.assert_allclose(actual, expected.numpy(), rtol=0, atol=4e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_small_size(seed: int) -> None:
    for size in range(1, 67):
        expected = torch.randn(size, generator=torch_generator(seed))
        assert_same_noise(randn((size,), seed), expected)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1, 1), (3, 5), (4, 4), (17,), (16, 1, 6, 9)])
def test_shapes(shape: tuple[int, ...]) -> None:
    assert_same_noise(randn(shape, 3), torch.randn(shape, generator=torch_generator(3)))


@pytest.mark.parametrize("seed", SEEDS)
def test_video_sized_latent(seed: int) -> None:
    shape = (16, 5, 60, 104)
    assert_same_noise(randn(shape, seed), torch.randn(shape, generator=torch_generator(seed)))


def test_many_values() -> None:
    """Enough values to meet the rare inputs: u = 0, angles at octant borders, large radii."""
    size = 2**22 + 3
    assert_same_noise(randn((size,), 11), torch.randn(size, generator=torch_generator(11)))


def test_successive_draws_continue_the_stream() -> None:
    """Odd small draws leave a spare value that the next small draw starts with."""
    ours, theirs = TorchGenerator(9), torch_generator(9)
    for size in [3, 16, 1, 40, 2, 5, 0, 17, 1, 1000, 1, 1]:
        assert_same_noise(ours.randn((size,)), torch.randn(size, generator=theirs))


def test_seeds_differ_and_repeat() -> None:
    assert not np.array_equal(randn((32,), 1), randn((32,), 2))
    np.testing.assert_array_equal(randn((32,), 1), randn((32,), 1))


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_seed_outside_64_bits(seed: int) -> None:
    with pytest.raises(UsageError, match=rf"^seed {seed} .*choose"):
        randn((4,), seed)
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)overflow|seed|large"):
        torch_generator(seed)
