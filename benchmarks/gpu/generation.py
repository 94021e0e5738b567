"""A whole generation by the built-in model, on compiled programs and on the processor."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import wanx
from benchmarks.gpu.context import BenchContext
from benchmarks.gpu.programs import compile_error
from benchmarks.gpu.report import Goal, Measurement, ReportItem, Times
from wanx.accuracy.metrics import cosine
from wanx.errors import EnvironmentMismatchError

PROCESSOR, PROGRAMS = "processor", "programs"
ROUNDS = 3


def generation(
    bench: BenchContext, bundle: Path, reference: str | Path = "tiny", **options: Any
) -> Iterator[ReportItem]:
    """Generate the same video with both; the frames must be the same but for rounding."""
    if not bundle.exists():
        raise EnvironmentMismatchError(f"the model was not compiled: {compile_error(bundle)}")
    videos = {}
    for by, source in ((PROCESSOR, reference), (PROGRAMS, bundle)):
        pipeline = wanx.load(source)
        frames, seconds = [], []
        # The first run loads programs from disk, and records graphs.
        for _ in range(1 if by == PROCESSOR else ROUNDS):
            start = time.perf_counter()
            video = pipeline(seed=0, **options)
            seconds.append(time.perf_counter() - start)
            assert video.frames is not None
            frames.append(video.frames)
        videos[by] = frames[-1].astype(np.float32) / 127.5 - 1
        numerics = {"cosine": cosine(videos[by], videos[PROCESSOR])}
        stages = {stage.name: round(stage.seconds, 4) for stage in video.stages}
        yield Measurement(
            operation="generation, tiny",
            implementation=by,
            times=Times(seconds=tuple(seconds)),
            numerics={} if by == PROCESSOR else numerics,
            details={"stages_s": stages, "frames": len(frames[-1])},
        )
    same = cosine(videos[PROGRAMS], videos[PROCESSOR])
    yield Goal.at_least("frames as the processor draws them, by their cosine 0.99", same, 0.99)
