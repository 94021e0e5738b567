"""How many videos are faultless in 8 bits, of more than the quick comparison has time for."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from drawings import draw
from figures import PRECISIONS, Measured

from wanx.bundle.reader import open_bundle

SEEDS = (1000, 2000, 3000)


@pytest.mark.slow
def test_faultless_videos_with_default_steps(
    measured: dict[str, Measured], bundle_folder: Path
) -> None:
    """One video in 123 is less than the point that 8 bits may cost."""

    def faultless(job: tuple[str, int]) -> int:
        precision, seed = job
        clips = draw(open_bundle(bundle_folder / precision), first_seed=seed, steps=None)
        assert len(clips.pairs) == 41
        return clips.faultless

    jobs = list(itertools.product(PRECISIONS, SEEDS))
    found = dict.fromkeys(PRECISIONS, 0.0)
    with ThreadPoolExecutor(max_workers=2) as pool:
        for (precision, _), count in zip(jobs, pool.map(faultless, jobs), strict=True):
            found[precision] += 100 * count / (41 * len(SEEDS))
    print(found)
    assert all(found[precision] >= found["fp32"] - 1 for precision in found), found
