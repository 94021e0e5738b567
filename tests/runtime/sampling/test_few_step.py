"""Solvers and lists of distilled models, against published tables, diffusers and formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from numpy.typing import NDArray

from wanx.errors import UsageError
from wanx.runtime.sampling.few_step import RCM_SIGMA_MAX_IMAGE, RcmOde
from wanx.runtime.sampling.noise import TorchGenerator
from wanx.runtime.sampling.sampler import warp
from wanx.runtime.sampling.solvers import make_sampler

Array = NDArray[Any]
SHAPE = (1, 4, 3, 6, 5)


def velocity_field(latent: Array, sigma: float) -> Array:
    """Of data that are all 0.3: the straight line there, and a wave beside it."""
    return np.asarray((latent - 0.3) / max(sigma, 0.05) + np.sin(3 * latent), np.float32)


@pytest.mark.parametrize(
    ("shift", "levels"),
    [
        (5.0, (1000, 937.5, 833.3333, 625)),
        (8.0, (1000, 960, 888.8889, 727.2727)),
        (3.0, (1000, 900, 750, 500)),
    ],
)
@pytest.mark.parametrize("solver", ["euler", "lcm"])
def test_published_four_steps(solver: str, shift: float, levels: tuple[float, ...]) -> None:
    found = make_sampler(solver, 4, shift).timesteps
    np.testing.assert_allclose(found, levels, rtol=1e-7)


def test_published_eight_steps() -> None:
    expected = [1000, 972.22, 937.5, 892.86, 833.33, 750, 625, 416.67]
    np.testing.assert_allclose(make_sampler("euler", 8, 5.0).timesteps, expected, rtol=1e-5)


@pytest.mark.parametrize("solver", ["rcm", "rcm-ode"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_published_levels_of_rcm(solver: str, steps: int) -> None:
    sampler = make_sampler(solver, steps, 1.0)
    expected = [0.98765, 0.93378, 0.85290, 0.60898][:steps]
    np.testing.assert_allclose(sampler.sigmas, [*expected, 0.0], atol=6e-6)
    assert sampler.noise_scale == sampler.sigmas[0]
    assert RcmOde.levels(1, 1.0, RCM_SIGMA_MAX_IMAGE)[0] == pytest.approx(0.99502, abs=6e-6)


def test_rcm_has_four_steps() -> None:
    with pytest.raises(UsageError, match="steps is 5; solver rcm takes 1 to 4"):
        make_sampler("rcm", 5, 1.0)


@pytest.mark.parametrize("steps", [1, 4, 9])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_euler_equals_diffusers(steps: int, shift: float) -> None:
    sampler = make_sampler("euler", steps, shift)
    peer = FlowMatchEulerDiscreteScheduler(shift=1.0)
    peer.set_timesteps(sigmas=sampler.sigmas[:-1].tolist())
    np.testing.assert_allclose(sampler.timesteps, peer.timesteps.numpy(), rtol=1e-6)
    latent = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    theirs = torch.from_numpy(latent)
    for timestep, sigma in zip(peer.timesteps, sampler.sigmas, strict=False):
        velocity = torch.from_numpy(velocity_field(theirs.numpy(), float(sigma)))
        latent = sampler.step(velocity_field(latent, float(sigma)), latent)
        theirs = peer.step(velocity, timestep, theirs).prev_sample
    np.testing.assert_allclose(latent, theirs.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("seed", [0, 7])
def test_lcm_equals_diffusers(steps: int, seed: int) -> None:
    """With the same noise: the run's own generator goes on behind the first latent."""
    generator = TorchGenerator(seed)
    latent = generator.randn(SHAPE)
    sampler = make_sampler("lcm", steps, 5.0, draw=generator.randn)
    torch_generator = torch.Generator().manual_seed(seed)
    theirs = torch.randn(SHAPE, generator=torch_generator)
    peer = FlowMatchLCMScheduler(shift=1.0)
    peer.set_timesteps(sigmas=sampler.sigmas[:-1].tolist())
    for timestep, sigma in zip(peer.timesteps, sampler.sigmas, strict=False):
        velocity = torch.from_numpy(velocity_field(theirs.numpy(), float(sigma)))
        latent = sampler.step(velocity_field(latent, float(sigma)), latent)
        theirs = peer.step(velocity, timestep, theirs, torch_generator).prev_sample
    np.testing.assert_allclose(latent, theirs.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", ["lcm", "rcm"])
def test_fresh_noise_is_reproducible(solver: str) -> None:
    def run(seed: int) -> Array:
        generator = TorchGenerator(seed)
        latent: Array = generator.randn(SHAPE)
        sampler = make_sampler(solver, 3, 5.0, draw=generator.randn)
        for sigma in sampler.sigmas[:-1]:
            latent = sampler.step(velocity_field(latent, float(sigma)), latent)
        return latent

    np.testing.assert_array_equal(run(3), run(3))
    assert np.abs(run(3) - run(4)).max() > 0.01
    sampler = make_sampler(solver, 2, 5.0)
    with pytest.raises(ValueError, match="draws noise"):
        sampler.step(np.zeros(SHAPE, np.float32), np.zeros(SHAPE, np.float32))


@pytest.mark.parametrize("solver", ["euler", "rcm-ode"])
def test_a_straight_line_is_exact(solver: str) -> None:
    """Where all data are one point, the velocity is constant along a solution."""
    sampler = make_sampler(solver, 4, 5.0)
    point, noise = 0.3, np.random.default_rng(1).standard_normal(50).astype(np.float32)
    sigma = float(sampler.sigmas[0])
    latent: Array = ((1 - sigma) * point + sigma * noise).astype(np.float32)
    for sigma in map(float, sampler.sigmas[:-1]):
        latent = sampler.step(np.asarray((latent - point) / sigma, np.float32), latent)
    np.testing.assert_allclose(latent, point, atol=1e-6)


@pytest.mark.parametrize("solver", ["lcm", "rcm"])
def test_noise_is_that_of_the_next_level(solver: str) -> None:
    """Of data that are all one point a latent is N((1 - σ)·point, σ²) at every level."""
    generator = TorchGenerator(0)
    sampler = make_sampler(solver, 4, 5.0, draw=generator.randn)
    point, latent = 0.3, generator.randn((40_000,))
    for now, after in zip(sampler.sigmas, sampler.sigmas[1:-1], strict=False):
        latent = sampler.step(np.asarray((latent - point) / now, np.float32), latent)
        assert latent.mean() == pytest.approx((1 - after) * point, abs=0.02)
        assert latent.std() == pytest.approx(after, rel=0.02)


def test_timesteps_of_their_own() -> None:
    sampler = make_sampler("lcm", 2, 1.0, np.array([1.0, 0.7568, 0.0]), timesteps=(1000, 757))
    assert sampler.timesteps == (1000, 757)
    with pytest.raises(UsageError, match="there are 2 timesteps; 3 steps need 3"):
        make_sampler("lcm", 3, 1.0, timesteps=(1000, 757))


def test_the_shift_in_exact_arithmetic() -> None:
    for shift in (0.3, 1.0, 5.0, 16.0):
        for level in (1.0, 0.7, 0.01):
            exact = shift * level / (1 + (shift - 1) * level)
            assert math.isclose(float(warp(np.array([level]), shift)[0]), exact, rel_tol=1e-14)
