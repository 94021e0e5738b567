"""Figures equal their definitions, written out in plain loops over float64."""

from __future__ import annotations

import math
import tracemalloc
import warnings
from collections.abc import Callable
from dataclasses import FrozenInstanceError, asdict
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from wanx.accuracy.metrics import (
    MAX_DB,
    MAX_PSNR,
    clip_figures,
    cosine,
    flicker,
    motion,
    psnr_db,
    relative,
    sqnr_db,
    ssim,
    temporal_difference,
)

RNG = np.random.default_rng(0)
Pixels = NDArray[np.uint8]

# Odd and even, sides of one pixel, around the window of 11, long and thin.
FRAME_SIZES = [
    *((11, 11), (12, 11), (11, 17), (13, 16), (15, 15), (10, 10), (10, 20), (9, 13), (14, 8)),
    *((7, 5), (2, 2), (2, 9), (1, 1), (1, 16), (16, 1), (3, 4)),
]
PAIRS: list[Callable[[Any, Any], Any]] = [
    *(cosine, sqnr_db, psnr_db, ssim, temporal_difference, clip_figures)
]
OF_VIDEOS = PAIRS[2:]


def video(frames: int, height: int, width: int, low: int = 0, high: int = 256) -> Pixels:
    return RNG.integers(low, high, (frames, height, width, 3), dtype=np.uint8)


def solid(frames: int, level: int, size: int = 16) -> Pixels:
    return np.full((frames, size, size, 3), level, np.uint8)


def scene(frames: int, height: int, width: int) -> Pixels:
    """Smooth waves that move, so that noise can be told from structure."""
    t, y, x, c = np.mgrid[:frames, :height, :width, :3]
    waves = np.sin(x / 5 + t / 2 + c) * np.cos(y / 7 - t / 3)
    return np.rint(128 + 90 * waves).astype(np.uint8)


def noisy(frames: Pixels, deviation: float, seed: int = 1) -> Pixels:
    noise = np.random.default_rng(seed).normal(0, deviation, frames.shape)
    return np.rint(np.clip(frames + noise, 0, 255)).astype(np.uint8)


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 0), (), (1, 65537), (3, 11, 5003)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_cosine_equals_torch(shape: tuple[int, ...], dtype: type[np.floating]) -> None:
    reference = RNG.normal(0.3, 1, shape).astype(dtype)
    candidate = (reference + RNG.normal(0, 0.5, shape)).astype(dtype)
    if not reference.size:
        assert cosine(candidate, reference) == 1
        return
    flat = (torch.from_numpy(np.float64(a).reshape(-1)) for a in (candidate, reference))
    expected = torch.nn.functional.cosine_similarity(*flat, dim=0).item()
    assert cosine(candidate, reference) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [1, 100, 65535, 65536, 65537, 200_001])
def test_sqnr_equals_its_definition(size: int) -> None:
    reference = RNG.normal(0, 3, size).astype(np.float32)
    candidate = (reference + RNG.normal(0.01, 0.2, size)).astype(np.float32)
    signal = math.fsum(float(r) ** 2 for r in reference)
    noise = math.fsum((float(c) - float(r)) ** 2 for c, r in zip(candidate, reference, strict=True))
    assert sqnr_db(candidate, reference) == pytest.approx(10 * math.log10(signal / noise))


@pytest.mark.parametrize("wanted", [-20.0, 0.0, 24.0, 25.0, 60.0, 150.0])
def test_sqnr_of_noise_of_known_power(wanted: float) -> None:
    signal, noise = RNG.normal(size=(2, 30_000))
    noise *= np.linalg.norm(signal) / np.linalg.norm(noise) * 10 ** (-wanted / 20)
    # What rounding to the sum leaves of noise at -150 dB is known to about 1e-8.
    assert sqnr_db(signal + noise, signal) == pytest.approx(wanted, abs=1e-6)


def test_sqnr_of_rounding() -> None:
    """Rounding to steps of Δ makes noise of power Δ²/12 (Bennett 1948)."""
    reference = RNG.uniform(-1, 1, 200_000)
    step = 2 / 255
    candidate = np.rint(reference / step) * step
    expected = 10 * math.log10((1 / 3) / (step**2 / 12))
    assert sqnr_db(candidate, reference) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("metric", [cosine, sqnr_db])
def test_layout_changes_nothing(metric: Callable[[Any, Any], float]) -> None:
    a, b = RNG.normal(size=(2, 301, 507))
    expected = metric(a, b)
    views = [
        (a.T, b.T),
        (np.asfortranarray(a), b),
        (a, np.asfortranarray(b)),
        (a[::-1, ::-1], b[::-1, ::-1]),
        (np.repeat(a, 2, axis=1)[:, ::2], b),
        (a.astype(">f8"), b),
        (a.reshape(3, 7, -1)[:, :0:-1], b.reshape(3, 7, -1)[:, :0:-1]),
    ]
    for c, r in views[:-1]:
        assert metric(c, r) == pytest.approx(expected, rel=1e-12)
    part = [np.ascontiguousarray(each) for each in views[-1]]
    assert metric(*views[-1]) == pytest.approx(metric(*part), rel=1e-12)


def test_arguments_stay_as_they_are() -> None:
    a, b = RNG.normal(size=(2, 100)).astype(np.float32)
    for each in (a, b):
        each.flags.writeable = False
    kept = a.copy(), b.copy()
    cosine(a, b)
    sqnr_db(a, b)
    assert np.array_equal(a, kept[0])
    assert np.array_equal(b, kept[1])


def test_types_may_differ() -> None:
    reference = RNG.integers(0, 256, 1000, dtype=np.uint8)
    candidate = RNG.integers(-128, 128, 1000, dtype=np.int8)
    c, r = (each.astype(np.float64) for each in (candidate, reference))
    assert cosine(candidate, reference) == pytest.approx(
        (c * r).sum() / np.sqrt((c**2).sum() * (r**2).sum())
    )
    assert sqnr_db(candidate, reference) == pytest.approx(
        10 * np.log10((r**2).sum() / ((c - r) ** 2).sum())
    )


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [(np.float16, 65504), (np.float32, 3.4e38), (np.int8, -128), (np.uint8, 255)],
)
def test_nothing_overflows_in_its_own_type(dtype: Any, largest: float) -> None:
    reference = np.full(100_000, largest, dtype)
    candidate = reference.copy()
    candidate[::2] = 0
    assert cosine(candidate, reference) == pytest.approx(math.sqrt(0.5))
    assert sqnr_db(candidate, reference) == pytest.approx(10 * math.log10(2))


def test_the_smallest_numbers_count() -> None:
    tiny = np.array([1e-45, -3e-45, 0], np.float32)
    assert cosine(tiny, -tiny) == -1
    assert sqnr_db(np.zeros_like(tiny), tiny) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("factor", [1e-6, 0.3, 7.0, 1e6])
def test_scale_changes_no_cosine(factor: float) -> None:
    a, b = RNG.normal(size=(2, 1000))
    assert cosine(a * factor, b) == pytest.approx(cosine(a, b), rel=1e-12)
    assert cosine(-factor * a, b) == pytest.approx(-cosine(a, b), rel=1e-12)
    assert cosine(a, b) == cosine(b, a)
    assert sqnr_db(a * factor, b * factor) == pytest.approx(sqnr_db(a, b), rel=1e-12)
    assert sqnr_db(b * (1 + factor), b) == pytest.approx(-20 * math.log10(factor), abs=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_equal_tensors_are_exactly_alike(dtype: type[np.floating]) -> None:
    for size in (*range(1, 40), 100_003):
        a = RNG.normal(size=size).astype(dtype)
        assert cosine(a, a.copy()) == 1
        assert cosine(a, -a) == -1
        assert sqnr_db(a, a.copy()) == MAX_DB == 200


def test_cosine_stays_within_one() -> None:
    a = RNG.normal(size=(500, 5))
    for row, factor in zip(a, RNG.uniform(0.1, 10, 500), strict=True):
        assert 1 - 1e-12 < cosine(row * factor, row) <= 1


def test_zeros() -> None:
    zero, one = np.zeros(9, np.float32), np.eye(3, dtype=np.float32).reshape(-1)
    assert cosine(zero, zero) == 1
    assert cosine(zero, one) == 0
    assert cosine(one, zero) == 0
    assert sqnr_db(zero, zero) == MAX_DB
    assert sqnr_db(zero, one) == 0
    assert sqnr_db(one, zero) == -MAX_DB


def test_sqnr_beyond_its_range_is_cut() -> None:
    reference = np.ones(1)
    assert sqnr_db(reference + np.spacing(1.0), reference * 1.0) == MAX_DB
    assert sqnr_db(np.full(1, 1e30), np.full(1, 1e-30)) == -MAX_DB
    assert sqnr_db(reference + 1e-9, reference) == pytest.approx(180, abs=1e-5)


@pytest.mark.parametrize("metric", [cosine, sqnr_db])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("other", ["noise", "zero", "same", "both"])
@pytest.mark.parametrize("place", [0, 70_000])
def test_what_is_not_finite_shows(
    metric: Callable[[Any, Any], float], value: float, other: str, place: int
) -> None:
    a, b = RNG.normal(size=(2, 70_001)).astype(np.float32)
    a[place] = value
    if other == "zero":
        b[:] = 0
    elif other == "same":
        b = a.copy()
    elif other == "both":
        a[1], b[2] = -math.inf, math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(metric(a, b))
        assert math.isnan(metric(b, a))


def test_tensors_are_read_in_chunks() -> None:
    a = RNG.normal(size=(2000, 1500)).astype(np.float16)
    b = a[::-1]
    for c, r in ((a, b), (a.T, b.T), (a, b.copy())):
        tracemalloc.start()
        cosine(c, r)
        sqnr_db(c, r)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 4e6  # in float64 each of them has 24 MB


def psnr_by_definition(c: Pixels, r: Pixels) -> list[float]:
    found = []
    for i in range(len(c)):
        error = np.mean((c[i].astype(np.float64) - r[i].astype(np.float64)) ** 2)
        found.append(min(100.0, 10 * math.log10(255.0**2 / error)) if error else 100.0)
    return found


def ssim_by_definition(c: Pixels, r: Pixels) -> list[float]:
    """Equations 13 to 17 of Wang et al. 2004, one window at a time, moments centred first."""
    frames, height, width, channels = c.shape
    side = max(n for n in (1, 3, 5, 7, 9, 11) if n <= min(height, width))
    half = side // 2
    gaussian = np.zeros((side, side))
    for i in range(side):
        for j in range(side):
            gaussian[i, j] = math.exp(-((i - half) ** 2 + (j - half) ** 2) / (2 * 1.5**2))
    gaussian /= gaussian.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    found = []
    for f in range(frames):
        of_channels = []
        for channel in range(channels):
            values = []
            for top in range(height - side + 1):
                for left in range(width - side + 1):
                    window = np.s_[f, top : top + side, left : left + side, channel]
                    x, y = c[window].astype(np.float64), r[window].astype(np.float64)
                    mx, my = (gaussian * x).sum(), (gaussian * y).sum()
                    vx = (gaussian * (x - mx) ** 2).sum()
                    vy = (gaussian * (y - my) ** 2).sum()
                    cov = (gaussian * (x - mx) * (y - my)).sum()
                    values.append(
                        (2 * mx * my + c1) * (2 * cov + c2)
                        / ((mx**2 + my**2 + c1) * (vx + vy + c2))
                    )  # fmt: skip
            of_channels.append(sum(values) / len(values))
        found.append(sum(of_channels) / channels)
    return found


def motion_by_definition(v: Pixels) -> float:
    x = v.astype(np.float64)
    steps = [np.abs(x[t + 1] - x[t]).mean() for t in range(len(x) - 1)]
    return float(np.mean(steps)) if steps else 0.0


def flicker_by_definition(v: Pixels) -> float:
    x = v.astype(np.float64)
    steps = [np.abs(x[t + 1] - 2 * x[t] + x[t - 1]).mean() for t in range(1, len(x) - 1)]
    return float(np.mean(steps)) if steps else 0.0


def temporal_difference_by_definition(c: Pixels, r: Pixels) -> float:
    x, y = c.astype(np.float64), r.astype(np.float64)
    steps = [
        np.abs((x[t + 1] - x[t]) - (y[t + 1] - y[t])).mean() for t in range(len(x) - 1)
    ]  # fmt: skip
    return float(np.mean(steps)) if steps else 0.0


@pytest.mark.parametrize("size", FRAME_SIZES)
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_videos_equal_the_definitions(frames: int, size: tuple[int, int]) -> None:
    reference = video(frames, *size)
    for candidate in (video(frames, *size), noisy(reference, 12)):
        psnr = psnr_db(candidate, reference)
        assert psnr.shape == (frames,)
        assert psnr.dtype == np.float64
        assert psnr == pytest.approx(psnr_by_definition(candidate, reference), rel=1e-12)
        assert temporal_difference(candidate, reference) == pytest.approx(
            temporal_difference_by_definition(candidate, reference), rel=1e-12
        )
        assert motion(candidate) == pytest.approx(motion_by_definition(candidate), rel=1e-12)
        assert flicker(candidate) == pytest.approx(flicker_by_definition(candidate), rel=1e-12)


@pytest.mark.parametrize("size", FRAME_SIZES)
def test_ssim_equals_the_definition(size: tuple[int, int]) -> None:
    reference = np.concatenate([video(1, *size), scene(1, *size), video(1, *size, 0, 3)])
    for candidate in (video(3, *size), noisy(reference, 12), 255 - reference):
        similarity = ssim(candidate, reference)
        assert similarity.shape == (3,)
        assert similarity.dtype == np.float64
        expected = ssim_by_definition(candidate, reference)
        assert similarity == pytest.approx(expected, rel=1e-9, abs=1e-11)


@pytest.mark.parametrize("offset", [1, 2, 10, 100, 255])
def test_a_constant_offset(offset: int) -> None:
    reference = video(4, 13, 17, 0, 256 - offset)
    candidate = reference + np.uint8(offset)
    expected = 20 * math.log10(255 / offset)
    for c, r in ((candidate, reference), (reference, candidate)):
        assert psnr_db(c, r) == pytest.approx([expected] * 4, rel=1e-12)
        figures = clip_figures(c, r)
        assert figures.psnr_db_min == pytest.approx(expected, rel=1e-12)
        assert figures.psnr_db_mean == pytest.approx(expected, rel=1e-12)
        assert figures.rmse == pytest.approx(offset)
        assert figures.temporal_difference == 0
        moved = motion(reference) > 0
        assert moved == (offset < 255)  # an offset of 255 leaves room for black alone
        assert figures.motion_ratio == figures.flicker_ratio == (1 if moved else None)


def test_ssim_of_flat_frames_compares_their_levels_alone() -> None:
    for a, b in ((0, 255), (100, 110), (250, 251), (0, 0)):
        expected = (2 * a * b + 2.55**2) / (a**2 + b**2 + 2.55**2)
        assert ssim(solid(2, a), solid(2, b)) == pytest.approx([expected] * 2, rel=1e-9)


def test_ssim_of_an_inverted_pattern_is_negative() -> None:
    reference = video(1, 20, 20)
    assert ssim(255 - reference, reference)[0] < -0.5


def test_each_frame_is_measured_by_itself() -> None:
    reference = scene(5, 24, 31)
    candidate = reference.copy()
    candidate[3] = noisy(reference[3:4], 30)[0]
    psnr, similarity = psnr_db(candidate, reference), ssim(candidate, reference)
    others = [0, 1, 2, 4]
    assert (psnr[others] == MAX_PSNR).all()
    assert (similarity[others] == 1).all()
    assert psnr[3] < 25
    assert similarity[3] < 0.8
    order = [4, 2, 3, 0, 1]
    assert np.array_equal(psnr_db(candidate[order], reference[order]), psnr[order])
    assert np.array_equal(ssim(candidate[order], reference[order]), similarity[order])


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("size", [(1, 1), (4, 9), (23, 37)])
def test_equal_videos(frames: int, size: tuple[int, int]) -> None:
    reference = video(frames, *size)
    candidate = reference.copy()
    assert (psnr_db(candidate, reference) == MAX_PSNR).all()
    assert MAX_PSNR == 100
    assert (ssim(candidate, reference) == 1).all()
    figures = clip_figures(candidate, reference)
    assert (figures.rmse, figures.temporal_difference) == (0, 0)
    assert figures.motion_ratio == (1 if frames > 1 else None)
    assert figures.flicker_ratio == (1 if frames > 2 else None)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (24, 32), (240, 416)])
def test_one_level_in_one_pixel(height: int, width: int) -> None:
    """Of the smallest error, only what a large frame dilutes reaches the maximum."""
    reference = np.zeros((1, height, width, 3), np.uint8)
    candidate = reference.copy()
    candidate[0, 0, 0, 0] = 1
    exact = 10 * math.log10(255**2 * reference.size)
    assert (exact > 100) == (height == 240)
    assert psnr_db(candidate, reference) == pytest.approx([min(exact, 100)], rel=1e-12)


def test_black_candidate() -> None:
    reference = scene(5, 20, 30)
    figures = clip_figures(np.zeros_like(reference), reference)
    assert figures.motion_ratio == 0
    assert figures.flicker_ratio == 0
    assert figures.ssim_mean < 0.05
    assert figures.rmse == pytest.approx(math.sqrt(np.mean(reference.astype(float) ** 2)))
    assert figures.temporal_difference == pytest.approx(motion_by_definition(reference))


def test_a_still_reference_has_no_ratios() -> None:
    still = np.broadcast_to(video(1, 12, 14), (5, 12, 14, 3))
    figures = clip_figures(video(5, 12, 14), still)
    assert figures.motion_ratio is None
    assert figures.flicker_ratio is None
    assert figures.temporal_difference > 0


def test_even_motion_has_no_flicker() -> None:
    ramp = np.arange(0, 60, 6, dtype=np.uint8)[:, None, None, None]
    moving = np.broadcast_to(ramp, (10, 8, 8, 3))
    assert motion(moving) == 6
    assert flicker(moving) == 0
    figures = clip_figures(moving, moving)
    assert figures.motion_ratio == 1
    assert figures.flicker_ratio is None


def test_the_largest_differences_do_not_overflow() -> None:
    blinking = np.concatenate([solid(1, 255 * (t % 2), 64) for t in range(6)])
    opposite = 255 - blinking
    assert motion(blinking) == 255
    assert flicker(blinking) == 510
    assert temporal_difference(blinking, opposite) == 510
    assert psnr_db(blinking, opposite) == pytest.approx(np.zeros(6), abs=1e-12)
    assert clip_figures(blinking, opposite).rmse == 255


def test_sums_over_large_frames_do_not_overflow() -> None:
    dark, bright = (np.full((2, 480, 832, 3), level, np.uint8) for level in (0, 255))
    assert psnr_db(dark, bright) == pytest.approx([0, 0], abs=1e-12)
    dark[1] = 255
    assert motion(dark) == 255
    assert temporal_difference(dark, bright) == 255


@pytest.mark.parametrize("shift", [0, 1, 37])
def test_mirrors_and_swaps_change_nothing(shift: int) -> None:
    reference = scene(4, 21 + shift, 26)
    candidate = noisy(reference, 20)
    expected = asdict(clip_figures(candidate, reference))
    for view in (np.s_[:, ::-1], np.s_[:, :, ::-1], np.s_[..., ::-1], np.s_[::-1]):
        assert asdict(clip_figures(candidate[view], reference[view])) == pytest.approx(expected)
    turned = (each.swapaxes(1, 2) for each in (candidate, reference))
    assert asdict(clip_figures(*turned)) == pytest.approx(expected)
    for metric in (psnr_db, ssim, temporal_difference):
        assert np.array_equal(metric(candidate, reference), metric(reference, candidate))
    swapped = clip_figures(reference, candidate)
    assert swapped.motion_ratio == pytest.approx(1 / expected["motion_ratio"])
    assert swapped.flicker_ratio == pytest.approx(1 / expected["flicker_ratio"])


def test_more_noise_is_worse() -> None:
    reference = scene(5, 32, 40)
    growing = [clip_figures(noisy(reference, d), reference) for d in (0, 1, 3, 8, 20, 60)]
    for better, worse in pairwise(growing):
        for name in ("psnr_db_min", "psnr_db_mean", "ssim_min", "ssim_mean"):
            assert getattr(worse, name) < getattr(better, name), name
        for name in ("rmse", "temporal_difference", "motion_ratio", "flicker_ratio"):
            assert getattr(worse, name) > getattr(better, name), name
    tensors = [RNG.normal(size=5000)]
    noise = RNG.normal(size=5000)
    tensors += [tensors[0] + deviation * noise for deviation in (1e-4, 0.01, 0.1, 1, 10)]
    for metric in (cosine, sqnr_db):
        figures = [metric(tensor, tensors[0]) for tensor in tensors]
        assert all(a > b for a, b in pairwise(figures)), figures


def test_a_frozen_clip_is_seen_in_time() -> None:
    reference = scene(5, 16, 16)
    frozen = np.broadcast_to(reference[:1], reference.shape)
    figures = clip_figures(frozen, reference)
    assert figures.motion_ratio == 0
    assert figures.temporal_difference == pytest.approx(motion(reference))


def test_clip_figures_sum_up_the_frames() -> None:
    reference = scene(5, 19, 23)
    candidate = np.concatenate([noisy(reference[t : t + 1], 3 + 4 * t) for t in range(5)])
    psnr = psnr_by_definition(candidate, reference)
    similarity = ssim_by_definition(candidate, reference)
    expected = {
        "psnr_db_min": min(psnr),
        "psnr_db_mean": sum(psnr) / 5,
        "ssim_min": min(similarity),
        "ssim_mean": sum(similarity) / 5,
        "rmse": math.sqrt(np.mean((candidate.astype(float) - reference.astype(float)) ** 2)),
        "temporal_difference": temporal_difference_by_definition(candidate, reference),
        "motion_ratio": motion_by_definition(candidate) / motion_by_definition(reference),
        "flicker_ratio": flicker_by_definition(candidate) / flicker_by_definition(reference),
    }
    figures = clip_figures(candidate, reference)
    found = asdict(figures)
    assert found == pytest.approx(expected)
    assert {type(value) for value in found.values()} == {float}
    with pytest.raises(FrozenInstanceError):
        figures.rmse = 0.0  # type: ignore[misc]


def test_videos_stay_as_they_are() -> None:
    a, b = video(3, 12, 15), video(3, 12, 15)
    for each in (a, b):
        each.flags.writeable = False
    kept = a.copy(), b.copy()
    clip_figures(a, b)
    assert np.array_equal(a, kept[0])
    assert np.array_equal(b, kept[1])


def test_memory_does_not_grow_with_the_length() -> None:
    frame = video(1, 60, 80)
    peaks = []
    for frames in (4, 100):
        clip = np.broadcast_to(frame, (frames, *frame.shape[1:]))
        tracemalloc.start()
        clip_figures(clip, clip)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


@pytest.mark.parametrize("metric", PAIRS)
@pytest.mark.parametrize(
    "shape", [(3, 8, 9, 3), (2, 9, 8, 3), (1, 8, 9, 3), (2, 8, 9, 1), (8, 9, 3)]
)
def test_shapes_must_not_differ(metric: Callable[[Any, Any], Any], shape: tuple[int, ...]) -> None:
    a, b = video(2, 8, 9), np.zeros(shape, np.uint8)
    with pytest.raises(ValueError, match="shapes differ") as caught:
        metric(b, a)
    assert str(a.shape) in str(caught.value)
    assert str(b.shape) in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((2, 8, 9, 3), np.float32),
        np.zeros((2, 8, 9, 3), np.int8),
        np.zeros((2, 8, 9), np.uint8),
        np.zeros((2, 3, 8, 9), np.uint8),
        np.zeros((0, 8, 9, 3), np.uint8),
        np.zeros((2, 0, 9, 3), np.uint8),
    ],
)
def test_what_is_no_video(wrong: NDArray[Any]) -> None:
    good = np.zeros(wrong.shape, np.uint8)
    for metric in OF_VIDEOS:
        for pair in ((wrong, good), (good, wrong)):
            with pytest.raises(ValueError, match="is no video"):
                metric(*pair)
    for metric_of_one in (motion, flicker):
        with pytest.raises(ValueError, match="is no video"):
            metric_of_one(wrong)


def test_relative() -> None:
    assert relative(3.0, 2.0) == 1.5
    assert relative(0.0, 2.0) == 0
    assert relative(3.0, 0.0) is None
    assert relative(0.0, -0.0) is None
    value = relative(math.nan, 2.0)
    assert value is not None
    assert math.isnan(value)
