"""Predictions of step caches, against their formulas written out, and where they are exact."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from wanx.runtime.sampling.cache import teacache
from wanx.runtime.sampling.cache.base import ScheduledCache, log_snr
from wanx.runtime.sampling.cache.easy import FIRST_STEPS, EasyCache
from wanx.runtime.sampling.cache.table import TableRecorder
from wanx.runtime.sampling.guidance import Branch
from wanx.runtime.sampling.solvers import make_sampler

Array = NDArray[Any]
SHAPE = (4, 3, 6)


def trajectory(noise_of: Any, steps: int = 12, seed: int = 0) -> tuple[list[float], list[Any]]:
    """Noise levels, and of each step the latent and velocities of a model that predicts noise."""
    draw = np.random.default_rng(seed)
    sampler = make_sampler("unipc", steps, 3.0)
    latent = draw.standard_normal(SHAPE).astype(np.float32)
    sigmas = [float(sigma) for sigma in sampler.sigmas[:-1]]
    found = []
    for sigma in sigmas:
        velocities: dict[Branch, Array] = {
            branch: ((noise_of(sigma, branch, seed) - latent) / (1 - sigma)).astype(np.float32)
            for branch in ("conditional", "unconditional")
        }
        found.append((latent, velocities))
        latent = sampler.step(velocities["conditional"], latent)
    return sigmas, found


def curved(sigma: float, branch: str, seed: int) -> Array:
    """Predicted noise that bends with λ, another way for each branch."""
    first, second, third = np.random.default_rng(seed + 100).standard_normal((3, *SHAPE))
    level = log_snr(sigma)
    return np.asarray(
        first
        + 0.3 * level * second
        + (0.02 if branch == "conditional" else 0.03) * level**2 * third
    )


def test_noise_that_is_linear_in_the_level_is_exact() -> None:
    first, second = np.random.default_rng(1).standard_normal((2, *SHAPE))
    sigmas, steps = trajectory(lambda sigma, *_: first + log_snr(sigma) * second)
    cache = ScheduledCache(sigmas, [0, 1, 4, 5])
    for step, (latent, velocities) in enumerate(steps):
        if not cache.skips(step, latent):
            cache.note(step, latent, velocities)
        elif step > 1:
            predicted = cache.predict(step, latent, "conditional")
            np.testing.assert_allclose(predicted, velocities["conditional"], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("branch", ["conditional", "unconditional"])
def test_one_computed_step_is_held(branch: Branch) -> None:
    sigmas, steps = trajectory(curved)
    cache = ScheduledCache(sigmas, [2])
    latent, velocities = steps[2]
    cache.note(2, latent, velocities)
    noise = latent + (1 - sigmas[2]) * velocities[branch]
    later, _ = steps[4]
    expected = (noise - later) / (1 - sigmas[4])
    np.testing.assert_allclose(cache.predict(4, later, branch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 2.5, 5.0])
@pytest.mark.parametrize(("step", "last", "before"), [(1, 0, None), (5, 3, 2), (11, 6, 1)])
def test_the_table_knows_the_error(step: int, last: int, before: int | None, scale: float) -> None:
    """Errors that it predicts from inner products are those of the predictions themselves."""
    samples = [trajectory(curved, seed=seed) for seed in range(3)]
    sigmas = samples[0][0]
    recorder = TableRecorder(sigmas)
    for _, steps in samples:
        recorded = recorder.trajectory()
        for number, (latent, velocities) in enumerate(steps):
            recorded.note(number, latent, velocities)
    costs = recorder.table().costs(sigmas, [scale] * len(sigmas))
    slope = costs.slope(step, last, before)

    def squares(weight: float) -> tuple[float, float]:
        error = norm = 0.0
        for _, steps in samples:
            cache = ScheduledCache(sigmas, [], {step: weight})
            for number in [last] if before is None else [before, last]:
                cache.note(number, *steps[number])
            latent, right = steps[step]
            wrong = {
                branch: cache.predict(step, latent, branch)
                for branch in ("conditional", "unconditional")
            }
            guided = [
                v["unconditional"] + scale * (v["conditional"] - v["unconditional"])
                for v in (wrong, right)
            ]
            error += float(np.square(guided[0] - guided[1]).sum())
            norm += float(np.square(guided[1]).sum())
        return error, norm

    error, norm = squares(slope)
    assert costs.error(step, last, before) == pytest.approx(error / norm, rel=2e-2)
    if before is not None:  # no other weight is better
        assert error <= 1.001 * min(squares(slope + 0.1)[0], squares(slope - 0.1)[0])


def test_levels_between_those_of_the_table() -> None:
    """A list of other noise levels costs what its own table says, to the interpolation."""

    def recorded(steps: int) -> Any:
        sigmas, found = trajectory(curved, steps)
        recorder = TableRecorder(sigmas)
        one = recorder.trajectory()
        for number, (latent, velocities) in enumerate(found):
            one.note(number, latent, velocities)
        return sigmas, recorder.table()

    sigmas, own = recorded(10)
    _, other = recorded(40)
    scales = [2.0] * 10
    for key in ((3, 2, 1), (6, 4, 2), (8, 5, 4)):
        expected = own.costs(sigmas, scales).error(*key)
        assert other.costs(sigmas, scales).error(*key) == pytest.approx(expected, rel=0.5)


def test_easy_cache_as_written_out() -> None:
    """Decisions and predictions, against the formula step by step."""
    sigmas, steps = trajectory(curved, 30)
    cache, threshold = EasyCache(len(sigmas), 0.2), 0.2
    error, rate, last = 0.0, None, None
    skipped = []
    for step, (latent, velocities) in enumerate(steps):
        previous = steps[step - 1][0]
        expected = False
        if FIRST_STEPS <= step < len(steps) - 1 and rate is not None and last is not None:
            error += rate * np.abs(latent - previous).mean() / np.abs(last[1]["conditional"]).mean()
            expected = error < threshold
        if not expected:
            error = 0.0
        assert cache.skips(step, latent) == expected
        if expected:
            assert last is not None
            skipped.append(step)
            for branch, velocity in last[1].items():
                predicted = cache.predict(step, latent, branch)
                np.testing.assert_allclose(predicted, latent + velocity - last[0], rtol=1e-6)
            continue
        if last is not None:
            rate = (
                np.abs(velocities["conditional"] - last[1]["conditional"]).mean()
                / np.abs(latent - last[0]).mean()
            )
        cache.note(step, latent, velocities)
        last = latent, velocities
    assert skipped
    assert set(range(FIRST_STEPS)).isdisjoint(skipped)


def test_published_thresholds_of_teacache() -> None:
    """Of a change of 0.03 a step, the sum reaches 0.08 at every third."""
    steps = teacache.computed_steps([0.0] + [0.03] * 11, 0.08)
    assert steps == (0, 3, 6, 9, 11)
    assert teacache.steps_within([0.0] + [0.03] * 11, [2] * 12, 10) == (0, 3, 6, 9, 11)
    assert teacache.steps_within([0.0] * 12, [2] * 12, 2) is None


def test_changes_of_teacache() -> None:
    embedded = np.array([[1.0, -1.0], [1.5, -1.0], [1.5, -1.0]], np.float32)
    # mean|Δ| / mean|before| = 0.25, then 0.
    found = teacache.changes(embedded, (2.0, 1.0, 0.5))
    assert found == pytest.approx([0.0, 2 * 0.25**2 + 0.25 + 0.5, 0.5])


@pytest.mark.parametrize(
    ("name", "pixels", "first"),
    [
        ("t2v-1.3B", 1, 2396.76752),
        ("t2v-14B", 1, -5784.54975374),
        ("i2v-14B", 832 * 480, -302.33167),
        ("i2v-14B", 1280 * 720, -114.36346466),
    ],
)
def test_coefficients_of_teacache(name: str, pixels: int, first: float) -> None:
    found = teacache.coefficients(name, pixels)
    assert found is not None
    assert found[0] == first
    assert teacache.coefficients("vace-14B", pixels) is None
