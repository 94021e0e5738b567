"""Distances of tensors and videos from their reference.

Pixels are 8-bit, and figures over them are in levels: 255ths of the full range. Everything is
summed in float64 or in whole numbers, one chunk or one frame at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]
Levels = NDArray[np.int16]  # differences of pixels, and differences of those

MAX_DB = 200.0
MAX_PSNR = 100.0

_PEAK = 255
_WINDOW = 11
_SIGMA = 1.5
_C1 = (0.01 * _PEAK) ** 2
_C2 = (0.03 * _PEAK) ** 2
_CHUNK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class ClipFigures:
    """Figures of :func:`clip_figures`.

    Attributes:
        psnr_db_min: PSNR of the worst frame, in dB.
        psnr_db_mean: Mean PSNR of the frames, in dB.
        ssim_min: SSIM of the worst frame.
        ssim_mean: Mean SSIM of the frames.
        rmse: Root of the mean squared error of the whole clip, in levels.
        temporal_difference: See :func:`temporal_difference`, in levels.
        motion_ratio: Motion as a multiple of the reference's; None where the reference is still.
        flicker_ratio: Flicker as a multiple of the reference's; None where the reference has none.
    """

    psnr_db_min: float
    psnr_db_mean: float
    ssim_min: float
    ssim_mean: float
    rmse: float
    temporal_difference: float
    motion_ratio: float | None
    flicker_ratio: float | None


@np.errstate(invalid="ignore")  # NaN and infinity show in the sums
def cosine(candidate: NDArray[Any], reference: NDArray[Any]) -> float:
    """Cosine of the angle between two tensors, ``c·r / (‖c‖‖r‖)``.

    Args:
        candidate: Real numbers in the range of float32, any shape.
        reference: The same shape, any type.

    Returns:
        From -1 to 1. 1 where both are zero, 0 where one is; nan where either holds NaN or infinity.

    Raises:
        ValueError: The shapes differ.
    """
    dot = candidate_power = reference_power = 0.0
    for c, r in _chunks(candidate, reference):
        dot += float(c @ r)
        candidate_power += float(c @ c)
        reference_power += float(r @ r)
    if not math.isfinite(candidate_power + reference_power):
        return math.nan
    if candidate_power == 0 or reference_power == 0:
        return float(candidate_power == reference_power)
    # One root of the product, not the product of two roots: equal tensors give exactly 1.
    return min(1.0, max(-1.0, dot / math.sqrt(candidate_power * reference_power)))


@np.errstate(invalid="ignore")
def sqnr_db(candidate: NDArray[Any], reference: NDArray[Any]) -> float:
    """Signal to quantisation noise ratio, ``10·log10(Σ r² / Σ (c - r)²)``.

    Args:
        candidate: Real numbers in the range of float32, any shape.
        reference: The same shape, any type.

    Returns:
        In dB, kept within ±``MAX_DB``, which is what equal tensors and a reference of zeros get;
        nan where either holds NaN or infinity.

    Raises:
        ValueError: The shapes differ.
    """
    signal = noise = 0.0
    for c, r in _chunks(candidate, reference):
        signal += float(r @ r)
        error = c - r
        noise += float(error @ error)
    if not math.isfinite(signal + noise):
        return math.nan
    if noise == 0:
        return MAX_DB
    if signal == 0:
        return -MAX_DB
    ratio = 10 * (math.log10(signal) - math.log10(noise))
    return min(MAX_DB, max(-MAX_DB, ratio))


def psnr_db(candidate: Pixels, reference: Pixels) -> Floats:
    """Peak signal to noise ratio of each frame, ``10·log10(255² / mean (c - r)²)``.

    Args:
        candidate: [F, H, W, 3], uint8.
        reference: The same.

    Returns:
        [F], in dB, at most ``MAX_PSNR``, which is what equal frames get.

    Raises:
        ValueError: The shapes differ, or these are no videos.
    """
    _require_alike(candidate, reference)
    return _psnr_db(_mean_squared_errors(candidate, reference))


def ssim(candidate: Pixels, reference: Pixels) -> Floats:
    """Structural similarity of each frame (Wang, Bovik, Sheikh and Simoncelli 2004).

    As published: a Gaussian window of 11x11 with σ = 1.5 whose weights sum to 1, K1 = 0.01,
    K2 = 0.03, only windows that lie inside the frame, and the mean of the channels. A frame with a
    side below 11 gets the largest square window with an odd side that fits.

    Args:
        candidate: [F, H, W, 3], uint8.
        reference: The same.

    Returns:
        [F], from -1 to 1; 1 for equal frames.

    Raises:
        ValueError: The shapes differ, or these are no videos.
    """
    _require_alike(candidate, reference)
    return np.array([_ssim(c, r) for c, r in zip(candidate, reference, strict=True)])


def temporal_difference(candidate: Pixels, reference: Pixels) -> float:
    """Mean ``|Δc - Δr|`` of the changes from frame to frame, in levels; 0 for a single frame.

    Args:
        candidate: [F, H, W, 3], uint8; Δ is the difference of a frame and the one before.
        reference: The same.

    Raises:
        ValueError: The shapes differ, or these are no videos.
    """
    _require_alike(candidate, reference)
    return _mean_magnitude(_changes(_errors(candidate, reference)))  # Δc - Δr = Δ(c - r)


def motion(video: Pixels) -> float:
    """Mean first difference in time, ``|v[t+1] - v[t]|``, in levels; 0 for a single frame.

    Args:
        video: [F, H, W, 3], uint8; ValueError otherwise.
    """
    _require_video(video)
    return _mean_magnitude(_changes(video))


def flicker(video: Pixels) -> float:
    """Mean second difference in time, ``|v[t+1] - 2·v[t] + v[t-1]|``, in levels.

    Args:
        video: [F, H, W, 3], uint8; ValueError otherwise. Fewer than three frames have no flicker.
    """
    _require_video(video)
    return _mean_magnitude(_changes(_changes(video)))


def relative(candidate: float, floor: float) -> float | None:
    """Express a figure as a multiple of a floor; None where the floor is 0 and tells nothing."""
    return None if floor == 0 else candidate / floor


def clip_figures(candidate: Pixels, reference: Pixels) -> ClipFigures:
    """Compare two videos of the same size, frame by frame and in time.

    Args:
        candidate: [F, H, W, 3], uint8.
        reference: The same.

    Raises:
        ValueError: The shapes differ, or these are no videos.
    """
    _require_alike(candidate, reference)
    squared = _mean_squared_errors(candidate, reference)
    psnr, similarity = _psnr_db(squared), ssim(candidate, reference)
    return ClipFigures(
        psnr_db_min=float(psnr.min()),
        psnr_db_mean=float(psnr.mean()),
        ssim_min=float(similarity.min()),
        ssim_mean=float(similarity.mean()),
        rmse=math.sqrt(squared.mean()),
        temporal_difference=temporal_difference(candidate, reference),
        motion_ratio=relative(motion(candidate), motion(reference)),
        flicker_ratio=relative(flicker(candidate), flicker(reference)),
    )


def _require_same_shape(candidate: NDArray[Any], reference: NDArray[Any]) -> None:
    if candidate.shape != reference.shape:
        raise ValueError(f"shapes differ: {candidate.shape} and its reference {reference.shape}")


def _require_video(video: Pixels) -> None:
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or video.size == 0:
        raise ValueError(f"{video.dtype} {video.shape} is no video; give uint8 [F, H, W, 3]")


def _require_alike(candidate: Pixels, reference: Pixels) -> None:
    _require_same_shape(candidate, reference)
    _require_video(candidate)
    _require_video(reference)


def _chunks(a: NDArray[Any], b: NDArray[Any]) -> Iterator[tuple[Floats, Floats]]:
    """Pair the elements of two arrays, flat, as float64, whatever their layouts; copy neither."""
    _require_same_shape(a, b)
    with np.nditer(
        [a, b],
        flags=["external_loop", "buffered", "zerosize_ok"],
        op_dtypes=[np.float64, np.float64],
        casting="same_kind",
        buffersize=_CHUNK,
    ) as chunks:
        yield from chunks


def _errors(candidate: Pixels, reference: Pixels) -> Iterator[Levels]:
    for c, r in zip(candidate, reference, strict=True):
        yield np.subtract(c, r, dtype=np.int16)


def _changes(frames: Iterable[NDArray[np.integer]]) -> Iterator[Levels]:
    """Differences of each frame from the next; done twice to pixels, at most 510 levels."""
    for before, after in pairwise(frames):
        yield np.subtract(after, before, dtype=np.int16)


def _mean_magnitude(frames: Iterable[Levels]) -> float:
    total = count = 0
    for frame in frames:
        total += int(np.abs(frame).sum(dtype=np.int64))
        count += frame.size
    return total / count if count else 0.0


def _mean_squared_errors(candidate: Pixels, reference: Pixels) -> Floats:
    """Mean squared error of each frame, [F], in squared levels."""
    errors = _errors(candidate, reference)
    return np.array([np.square(error, dtype=np.int32).mean(dtype=np.float64) for error in errors])


def _psnr_db(squared: Floats) -> Floats:
    with np.errstate(divide="ignore"):
        ratio: Floats = 10 * np.log10(_PEAK**2 / squared)
    return np.minimum(ratio, MAX_PSNR)


def _ssim(candidate: Pixels, reference: Pixels) -> float:
    """SSIM of two frames [H, W, 3]."""
    side = min(_WINDOW, *candidate.shape[:2])
    side -= 1 - side % 2
    weights = np.exp(-0.5 * ((np.arange(side) - side // 2) / _SIGMA) ** 2)
    weights /= weights.sum()
    c, r = candidate.astype(np.float64), reference.astype(np.float64)
    c_mean, r_mean = _filter(c, weights), _filter(r, weights)
    product = c_mean * r_mean
    squares = c_mean**2 + r_mean**2
    covariance = _filter(c * r, weights) - product
    variances = _filter(c**2 + r**2, weights) - squares  # only their sum is needed
    similarity = (2 * product + _C1) * (2 * covariance + _C2)
    similarity /= (squares + _C1) * (variances + _C2)
    return float(similarity.mean())


def _filter(image: Floats, weights: Floats) -> Floats:
    """Weigh every window inside an image [H, W, 3] by the outer product of the weights."""
    for axis in (0, 1):
        image = np.asarray(sliding_window_view(image, len(weights), axis=axis) @ weights)
    return image
