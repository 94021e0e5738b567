"""Guidance equals diffusers' expression in torch, bit for bit, and asks for no branch too many."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
)
from numpy.typing import NDArray

from wanx.errors import UsageError
from wanx.runtime.sampling.guidance import (
    Guidance,
    branches,
    guide,
    parse_guide_scale,
    scales_of,
)

Array = NDArray[Any]

SCALES = [-1.5, 0.0, 0.3, 1.0, 2.5, 5.0, 7.1]


@pytest.mark.parametrize("scale", SCALES)
def test_equals_torch(scale: float) -> None:
    generator = np.random.default_rng(0)
    conditional, unconditional = generator.standard_normal((2, 7, 64)).astype(np.float32)
    c, u = torch.from_numpy(conditional), torch.from_numpy(unconditional)
    guided = guide(conditional, unconditional, scale)
    assert guided.dtype == np.float32
    np.testing.assert_array_equal(guided, (u + scale * (c - u)).numpy())


@pytest.mark.parametrize("scale", SCALES)
def test_a_single_branch_is_the_guided_prediction(scale: float) -> None:
    generator = np.random.default_rng(1)
    c, u = generator.standard_normal((2, 5)).astype(np.float32)
    needed = branches(scale)
    assert len(needed) == (1 if scale in (0, 1) else 2)
    if len(needed) == 1:
        only = {"conditional": c, "unconditional": u}[needed[0]]
        np.testing.assert_allclose(guide(c, u, scale), only, atol=1e-6)


def test_branches_take_integers() -> None:
    assert branches(0) == ("unconditional",)
    assert branches(1) == ("conditional",)
    assert set(branches(5)) == {"conditional", "unconditional"}


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_scale_must_be_finite(scale: float) -> None:
    velocity = np.zeros(3, np.float32)
    with pytest.raises(UsageError, match=f"guide scale is {scale}"):
        branches(scale)
    with pytest.raises(UsageError, match=f"guide scale is {scale}"):
        guide(velocity, velocity, scale)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scale", [1e40, -1e300, 3e38])
def test_scales_beyond_float32_say_nothing(scale: float) -> None:
    """The step that follows refuses the result in one line."""
    velocity = np.array([-2, 3], np.float32)
    assert not np.isfinite(guide(velocity, -velocity, scale)).any()


def test_shapes_must_match() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        guide(np.zeros((2, 3), np.float32), np.zeros(3, np.float32), 5.0)


def peer(guider: Any, conditional: Array, unconditional: Array, step: int = 5) -> Array:
    """What a guider of diffusers makes of the two predictions, as batches of one."""
    guider.set_state(step=step, num_inference_steps=20, timestep=torch.tensor(500.0))
    c, u = (torch.from_numpy(value)[None] for value in (conditional, unconditional))
    return np.asarray(guider.forward(c, u).pred[0].numpy())


@pytest.mark.parametrize("scale", [1.5, 5.0, 7.1])
@pytest.mark.parametrize("rescale", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["plain", "zero_star", "projected"])
def test_variants_equal_diffusers(kind: str, rescale: float, scale: float) -> None:
    draw = np.random.default_rng(3)
    c, u = draw.standard_normal((2, 16, 3, 6, 10)).astype(np.float32)
    u += 0.5 * c
    guiders = {
        "plain": ClassifierFreeGuidance(guidance_scale=scale, guidance_rescale=rescale),
        "zero_star": ClassifierFreeZeroStarGuidance(
            guidance_scale=scale, guidance_rescale=rescale, zero_init_steps=1
        ),
        # The paper's form, without momentum or a limit of the norm.
        "projected": AdaptiveProjectedGuidance(
            guidance_scale=scale - 1, guidance_rescale=rescale, eta=0.0,
            adaptive_projected_guidance_rescale=0.0, use_original_formulation=True,
        ),
    }  # fmt: skip
    ours = Guidance(
        scales=(scale,) * 20, rescale=rescale, zero_star=kind == "zero_star",
        projected=kind == "projected",
    ).combine(5, {"conditional": c, "unconditional": u})  # fmt: skip
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, peer(guiders[kind], c, u), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("steps", [1, 4, 5, 20, 50])
def test_shares_of_the_run(steps: int) -> None:
    scales = scales_of("5@0-40%,2@40-80%", steps)
    expected = [5.0 if i / steps < 0.4 else 2.0 if i / steps < 0.8 else 1.0 for i in range(steps)]
    assert scales == tuple(expected)
    guidance = Guidance(scales=scales, zero_steps=1)
    assert guidance.branches_at(0) == ()
    for step in range(1, steps):
        assert len(guidance.branches_at(step)) == (1 if scales[step] == 1 else 2)


def test_a_run_without_guidance_needs_one_branch() -> None:
    assert Guidance(scales=scales_of(1.0, 4)).branches == ("conditional",)
    assert Guidance(scales=scales_of("5@0-50%", 4)).branches == ("conditional", "unconditional")
    assert Guidance(scales=scales_of("0@0-100%", 4)).branches == ("unconditional",)


def test_scales_as_text() -> None:
    assert parse_guide_scale(" 7.5 ") == 7.5
    assert parse_guide_scale("5@0-40%, 1@40-100%") == "5@0-40%,1@40-100%"
