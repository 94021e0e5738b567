"""Samplers against diffusers, against quadrature in 40 digits, and on an ODE with a known solution.

The oracle of the whole pipeline is ``diffusers.WanPipeline`` from the same seed (PSNR of at least
50 dB). Its UniPC starts from the grid ``linspace(1, .001, N + 1)``, so that test hands diffusers'
noise levels to `make_sampler`, as `test_unipc_equals_diffusers` does here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import diffusers
import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from wanx.errors import UsageError
from wanx.runtime.sampling.solvers import make_sampler

Array = NDArray[Any]
MULTISTEP = ("unipc", "dpm++")
GRID_START = {"unipc": float(np.float32(0.999)), "dpm++": 1.0}


def velocity_field(latent: Array, sigma: float) -> Array:
    """A smooth nonlinear stand-in for the model."""
    return np.asarray(np.sin(3 * latent) + sigma * latent - 0.3, latent.dtype)


def peer_scheduler(solver: str, **options: Any) -> Any:
    """The class of diffusers that implements ``solver``, set up for flow matching."""
    name = {"unipc": "UniPCMultistepScheduler", "dpm++": "DPMSolverMultistepScheduler"}[solver]
    return getattr(diffusers, name)(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_type="midpoint", **options
    )


def run(solver: str, steps: int, shift: float, latent: Array, sigmas: Array | None = None) -> Array:
    sampler = make_sampler(solver, steps, shift, sigmas)
    for sigma in sampler.sigmas[:-1]:
        latent = sampler.step(velocity_field(latent, float(sigma)), latent)
    return latent


@pytest.mark.parametrize(("solver", "first"), [("unipc", 999), ("dpm++", 1000)])
def test_published_timesteps(solver: str, first: int) -> None:
    """The table of the reference implementation for 50 steps and shift 5."""
    timesteps = make_sampler(solver, 50, 5.0).timesteps
    assert timesteps[:4] == (first, 995, 991, 987)
    assert timesteps[-3:] == (241, 172, 92)


@pytest.mark.parametrize("solver", MULTISTEP)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50, 1000])
@pytest.mark.parametrize("shift", [0.1, 1.0, 5.0, 16.0])
def test_grid_in_exact_arithmetic(solver: str, steps: int, shift: float) -> None:
    sampler = make_sampler(solver, steps, shift)
    assert sampler.sigmas.dtype == np.float64
    assert len(sampler.sigmas) == steps + 1 == len(sampler.timesteps) + 1
    assert sampler.sigmas[-1] == 0
    with mpmath.workdps(40):
        for i, (sigma, timestep) in enumerate(zip(sampler.sigmas, sampler.timesteps, strict=False)):
            level = mpmath.mpf(GRID_START[solver]) * (steps - i) / steps
            exact = shift * level / (1 + (shift - 1) * level)
            assert abs(sigma - exact) < 1e-14
            # Where 1000·σ is an integer, truncation after rounding may land on either side.
            assert -1e-9 < 1000 * exact - timestep < 1 + 1e-9


@pytest.mark.parametrize("solver", MULTISTEP)
def test_many_steps_repeat_timesteps(solver: str) -> None:
    """Steps are counted, never looked up by timestep: 1000 shifted steps share timesteps."""
    assert len(set(make_sampler(solver, 1000, 16.0).timesteps)) < 1000
    assert gaussian_error(solver, 1000, 16.0, np.float32) < 2e-3


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10, 50])
@pytest.mark.parametrize("shift", [1.0, 5.0, 16.0])
def test_unipc_equals_diffusers(steps: int, shift: float) -> None:
    peer = peer_scheduler("unipc", flow_shift=shift)
    peer.set_timesteps(steps)
    grid = np.linspace(1, 0.001, steps + 1)[:-1]
    sigmas = np.append(shift * grid / (1 + (shift - 1) * grid), 0.0)
    sigmas[0] -= 1e-6
    np.testing.assert_array_equal(sigmas.astype(np.float32), peer.sigmas.numpy())
    assert make_sampler("unipc", steps, shift, sigmas).timesteps == tuple(peer.timesteps.tolist())
    # The first level, 1 - 1e-6, changes λ by 0.01 when rounded: give both the rounded ones.
    sampler = make_sampler("unipc", steps, shift, peer.sigmas.double().numpy())
    assert_same_trajectory(sampler.step, sampler.sigmas, peer)


@pytest.mark.parametrize("solver", MULTISTEP)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10, 50])
@pytest.mark.parametrize("shift", [1.0, 5.0, 16.0])
def test_own_grid_through_diffusers(solver: str, steps: int, shift: float) -> None:
    peer = peer_scheduler(solver)
    sampler = make_sampler(solver, steps, shift)
    peer.set_timesteps(steps)
    peer.sigmas = torch.from_numpy(sampler.sigmas)
    peer.timesteps = torch.tensor(sampler.timesteps)
    assert_same_trajectory(sampler.step, sampler.sigmas, peer)


def assert_same_trajectory(step: Callable[[Array, Array], Array], sigmas: Array, peer: Any) -> None:
    """Feed both the same latents and velocities, so that no difference can grow on its own."""
    latent = np.random.default_rng(0).standard_normal((1, 4, 3, 5)).astype(np.float32)
    peer.set_begin_index(0)
    for timestep, sigma in zip(peer.timesteps, sigmas, strict=False):
        velocity = velocity_field(latent, float(sigma))
        theirs = peer.step(torch.from_numpy(velocity), timestep, torch.from_numpy(latent))
        latent = step(velocity, latent)
        assert latent.dtype == np.float32
        np.testing.assert_allclose(latent, theirs.prev_sample.numpy(), rtol=2e-5, atol=2e-5)


def textbook(sigmas: list[Any], predictions: list[Any], latent: Any, corrects: bool) -> Any:
    """UniPC and DPM-Solver++ from their papers, with integrals where wanx has closed forms.

    The exact solution between two levels is ``x' = (σ'/σ)·x + σ'·∫ exp(λ)·m(λ) dλ``. The predictor
    takes m as constant, plus half the extrapolated slope over the step; the corrector of order 2
    integrates the parabola through three predictions, that of order 1 takes the mean of two.
    """
    alpha = [1 - s for s in sigmas]
    lam = [mpmath.log(a / s) if s else mpmath.inf for a, s in zip(alpha, sigmas, strict=True)]
    last = len(sigmas) - 2
    previous = latent
    for i in range(last + 1):
        if corrects and i > 0:
            nodes = [i, i - 1, i - 2] if i >= 2 else [i, i - 1]
            integral = mpmath.quad(
                lambda t, nodes=nodes: mpmath.exp(t) * interpolate(t, nodes, lam, predictions),
                [lam[i - 1], lam[i]],
            )
            if i == 1:
                mean = (predictions[0] + predictions[1]) / 2
                integral = (mpmath.exp(lam[1]) - mpmath.exp(lam[0])) * mean
            latent = sigmas[i] / sigmas[i - 1] * previous + sigmas[i] * integral
        previous = latent
        effective = predictions[i]
        if i == last:
            return effective
        if i > 0:
            slope = (predictions[i] - predictions[i - 1]) / (lam[i] - lam[i - 1])
            effective += slope * (lam[i + 1] - lam[i]) / 2
        growth = alpha[i + 1] - sigmas[i + 1] * alpha[i] / sigmas[i]
        latent = sigmas[i + 1] / sigmas[i] * latent + growth * effective
        yield latent


def interpolate(at: Any, nodes: list[int], lam: list[Any], values: list[Any]) -> Any:
    """Lagrange interpolation of ``values`` over ``lam`` at the given nodes."""
    total = mpmath.mpf(0)
    for j in nodes:
        others = [k for k in nodes if k != j]
        total += values[j] * mpmath.fprod((at - lam[k]) / (lam[j] - lam[k]) for k in others)
    return total


@pytest.mark.parametrize("solver", MULTISTEP)
@pytest.mark.parametrize("steps", [2, 3, 4, 9])
def test_equals_the_papers(solver: str, steps: int) -> None:
    """In float64, with clean predictions that are dictated to both sides."""
    sigmas = np.append(np.linspace(0.97, 0.08, steps) ** 1.5, 0.0)
    predictions = np.random.default_rng(steps).standard_normal(steps)
    sampler = make_sampler(solver, steps, 1.0, sigmas)
    with mpmath.workdps(40):
        exact = textbook(
            [mpmath.mpf(float(s)) for s in sigmas],
            [mpmath.mpf(float(m)) for m in predictions],
            mpmath.mpf("0.7"),
            corrects=solver == "unipc",
        )
        expected = [float(x) for x in exact]
    latent: Array = np.array([0.7])
    for i, prediction in enumerate(predictions):
        latent = sampler.step((latent - prediction) / sigmas[i], latent)
        wanted = expected[i] if i < steps - 1 else predictions[-1]
        np.testing.assert_allclose(latent, wanted, rtol=1e-11)


def gaussian_error(solver: str, steps: int, shift: float, dtype: type[Any]) -> float:
    """Largest error on normal data N(μ, 1), whose velocity and solution have closed forms.

    A latent at level σ is N((1 - σ)μ, (1 - σ)² + σ²), and along a solution its standardised value
    does not change.
    """
    mean = 0.4
    sampler = make_sampler(solver, steps, shift)
    latent: Array = np.linspace(-2.5, 2.5, 11).astype(dtype)
    sigma = float(sampler.sigmas[0])
    solution = mean + (latent - (1 - sigma) * mean) / math.hypot(1 - sigma, sigma)
    for sigma in map(float, sampler.sigmas[:-1]):
        clean = mean + (1 - sigma) * (latent - (1 - sigma) * mean) / ((1 - sigma) ** 2 + sigma**2)
        velocity: Array = (latent - clean) / sigma
        latent = sampler.step(velocity, latent)
    return float(np.abs(latent - solution).max())


@pytest.mark.parametrize("solver", MULTISTEP)
def test_second_order(solver: str) -> None:
    """Halving the step divides the error by about 4; a first-order method halves it."""
    errors = [gaussian_error(solver, steps, 1.0, np.float64) for steps in (80, 160, 320, 640)]
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert errors[-1] < 2e-5
    assert min(orders) > 1.75


@pytest.mark.parametrize("solver", MULTISTEP)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_result_is_the_last_clean_prediction(solver: str, steps: int) -> None:
    sampler = make_sampler(solver, steps, 5.0)
    latent = np.random.default_rng(1).standard_normal((2, 3, 4)).astype(np.float32)
    for sigma in sampler.sigmas[:-1]:
        velocity = velocity_field(latent, float(sigma))
        clean = latent - np.float32(sigma) * velocity
        latent = sampler.step(velocity, latent)
    np.testing.assert_array_equal(latent, clean)


@pytest.mark.parametrize("solver", MULTISTEP)
def test_explicit_grid_may_start_at_pure_noise(solver: str) -> None:
    """σ = 1 has λ = -∞; the limit must come out, and close to what σ just below 1 gives."""
    latent = np.random.default_rng(2).standard_normal(32).astype(np.float32)
    grid = np.linspace(1, 0, 9)
    near = grid.copy()
    near[0] = 1 - 1e-9
    exact = run(solver, 8, 1.0, latent, grid)
    assert np.isfinite(exact).all()
    np.testing.assert_allclose(exact, run(solver, 8, 1.0, latent, near), atol=0.02)


def test_inputs_are_left_alone() -> None:
    sampler = make_sampler("unipc", 4, 5.0)
    latent = np.ones((2, 2), np.float32)
    velocity = np.full((2, 2), 0.5, np.float32)
    for _ in range(4):
        before = latent.copy()
        after = sampler.step(velocity, latent)
        np.testing.assert_array_equal(latent, before)
        np.testing.assert_array_equal(velocity, 0.5)
        latent = after


@pytest.mark.parametrize(
    ("solver", "steps", "shift", "message"),
    [
        ("heun", 10, 5.0, "unknown solver 'heun'; choose one of: unipc, dpm"),
        ("unipc", 0, 5.0, "steps is 0"),
        ("unipc", -3, 5.0, "steps is -3"),
        ("dpm++", 10, 0.0, "shift is 0.0"),
        ("dpm++", 10, -1.0, "shift is -1.0"),
        ("unipc", 10, math.nan, "shift is nan"),
        ("unipc", 10, math.inf, "shift is inf"),
        ("unipc", 10, 1e30, "shift 1e.30 with 10 steps"),
        ("dpm++", 10, 1e308, "shift 1e.308 with 10 steps"),
    ],
)
def test_bad_options(solver: str, steps: int, shift: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_sampler(solver, steps, shift)


@pytest.mark.parametrize(
    "sigmas",
    [
        *([1.0, 0.5], [1.0, 0.5, 0.1], [[1.0, 0.5, 0.0]]),
        *(
            [1.1, 0.5, 0.0],
            [0.5, 0.5, 0.0],
            [0.4, 0.5, 0.0],
            [0.5, -0.1, 0.0],
            [math.nan, 0.5, 0.0],
        ),
    ],
)
def test_bad_explicit_sigmas(sigmas: list[Any]) -> None:
    with pytest.raises(UsageError, match=r"^sigmas "):
        make_sampler("unipc", 2, 5.0, np.array(sigmas))


def test_caller_keeps_its_sigmas() -> None:
    mine = np.array([1.0, 0.5, 0.0])
    sampler = make_sampler("unipc", 2, 5.0, mine)
    mine[:] = 7
    np.testing.assert_array_equal(sampler.sigmas, [1.0, 0.5, 0.0])


def test_step_misuse() -> None:
    sampler = make_sampler("unipc", 1, 5.0)
    latent = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match="differ in shape"):
        sampler.step(np.zeros(3, np.float32), latent)
    sampler.step(latent, latent)
    with pytest.raises(ValueError, match="all 1 steps are done"):
        sampler.step(latent, latent)
