"""Guidance equals diffusers' expression in torch, bit for bit, and asks for no branch too many."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from wanx.errors import UsageError
from wanx.runtime.sampling.guidance import branches, guide

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
