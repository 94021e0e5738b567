"""Distances of candidate and ulp baseline from the reference video."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wanx.accuracy.metrics import ClipFigures, clip_figures, psnr_db, relative
from wanx.errors import WanxError
from wanx.runtime.output.frame_checks import FrameCheck

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, eq=False)
class Still:
    """One frame of the three clips, each ``[H, W, 3]``; ``label`` says why it was chosen."""

    label: str
    index: int
    reference: Pixels
    candidate: Pixels
    ulp_baseline: Pixels


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipComparison:
    """A clip of the candidate against the reference's, and what a single ulp does to the latter.

    The two run freely from the same seed, so their trajectories part. The baseline is the reference
    again with every value of its initial noise moved by one ulp: how far apart two runs of the very
    same model are.
    """

    candidate: ClipFigures
    ulp_baseline: ClipFigures
    stills: tuple[Still, ...] = ()

    @property
    def ratios(self) -> dict[str, float | None]:
        """Distances as multiples of those of the ulp baseline; None where that is 0.

        ``dissimilarity`` is 1 less the SSIM of the worst frame.
        """
        ours, ulp_baseline = self.candidate, self.ulp_baseline
        return {
            "rmse": relative(ours.rmse, ulp_baseline.rmse),
            "dissimilarity": relative(1 - ours.ssim_min, 1 - ulp_baseline.ssim_min),
            "temporal_difference": relative(
                ours.temporal_difference, ulp_baseline.temporal_difference
            ),
        }


def to_pixels(decoded: Iterable[NDArray[np.float32]]) -> tuple[Pixels | None, str | None]:
    """Turn decoded frames ``[n, H, W, 3]`` into pixels, and look at their health.

    Returns:
        The frames ``[F, H, W, 3]``, None where some value is not finite; and what is wrong with
        them, None where nothing is.
    """
    check = FrameCheck()
    frames: list[Pixels] = []
    for part in decoded:
        try:
            frames.append(check.convert(part, sum(len(each) for each in frames)))
            check.update(frames[-1])
        except WanxError as error:
            return None, _finding(error)
    try:
        check.finish()
    except WanxError as error:
        return np.concatenate(frames), _finding(error)
    return np.concatenate(frames), None


def compare_clips(candidate: Pixels, reference: Pixels, ulp_baseline: Pixels) -> ClipComparison:
    """Compare three clips ``[F, H, W, 3]`` of one run, and keep the frames worth looking at."""
    last = len(reference) - 1
    chosen = {"first": 0, "middle": last // 2, "worst": int(psnr_db(candidate, reference).argmin())}
    labels: dict[int, list[str]] = {}
    for label, index in chosen.items():
        labels.setdefault(index, []).append(label)
    return ClipComparison(
        candidate=clip_figures(candidate, reference),
        ulp_baseline=clip_figures(ulp_baseline, reference),
        stills=tuple(
            Still(
                label=", ".join(names),
                index=index,
                reference=reference[index].copy(),
                candidate=candidate[index].copy(),
                ulp_baseline=ulp_baseline[index].copy(),
            )
            for index, names in labels.items()
        ),
    )


def _finding(error: WanxError) -> str:
    """The finding, without the advice for somebody who wanted a video."""
    return str(error).partition(";")[0]
