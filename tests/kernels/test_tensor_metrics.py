"""Distances of tensors against those of arrays, which sum in float64 by another code."""

from __future__ import annotations

import math

import pytest
import torch

from wanx.accuracy import metrics
from wanx.kernels import tensor_metrics
from wanx.kernels.tensor_metrics import Difference


@pytest.mark.parametrize("noise", [0.0, 1e-4, 0.3, 5.0])
def test_as_for_arrays(noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_metrics, "_CHUNK", 100)
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(7, 61, generator=generator)
    candidate = reference + noise * torch.randn(7, 61, generator=generator)
    difference = Difference.of(candidate.T, reference.T)  # not contiguous
    arrays = candidate.numpy(), reference.numpy()
    assert difference.cosine == pytest.approx(metrics.cosine(*arrays), abs=1e-12)
    assert difference.sqnr_db == pytest.approx(metrics.sqnr_db(*arrays), abs=1e-9)
    relative = float((candidate - reference).double().norm() / reference.double().norm())
    assert difference.relative_rms == pytest.approx(relative)


def test_pairs_add_up() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 30, generator=generator)
    parts = Difference()
    parts.add(a[:11], b[:11])
    parts.add(a[11:], b[11:])
    whole = Difference.of(a, b)
    assert parts.sqnr_db == pytest.approx(whole.sqnr_db)
    assert parts.max_error == whole.max_error


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_never_passes(value: float, side: int) -> None:
    pair = [torch.ones(5), torch.ones(5)]
    pair[side][3] = value
    difference = Difference.of(*pair)
    assert math.isnan(difference.cosine)
    assert math.isnan(difference.relative_rms)
    assert difference.sqnr_db == -tensor_metrics.MAX_DB


def test_an_exact_answer_and_silence() -> None:
    ones, zeros = torch.ones(5), torch.zeros(5)
    assert Difference.of(ones, ones).sqnr_db == tensor_metrics.MAX_DB
    assert Difference.of(ones, zeros).sqnr_db == -tensor_metrics.MAX_DB
    assert Difference.of(zeros[:0], zeros[:0]).relative_rms == 0
    with pytest.raises(ValueError, match="shapes differ"):
        Difference.of(ones, ones[:1])
