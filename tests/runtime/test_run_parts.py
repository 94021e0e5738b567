"""The parts of a run over networks that stay open, against videos that are made one by one."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import replace

import numpy as np
import pytest

import wanx
from wanx.runtime.denoise import NonFiniteLatentError
from wanx.runtime.inputs.reading import Inputs
from wanx.runtime.options import ResolvedRun, RunOptions
from wanx.runtime.output.frame_checks import FrameCheck
from wanx.runtime.pipeline import Pipeline
from wanx.runtime.resolve import resolve
from wanx.runtime.run_parts import RunParts

VIDEOS = (
    {"prompt": "a red circle", "width": 48, "height": 32, "frames": 9, "steps": 2, "seed": 1},
    {"prompt": "a blue square", "width": 32, "height": 32, "frames": 1, "steps": 1, "seed": 2,
     "guide_scale": 1.0},
    {"prompt": "a red circle", "width": 48, "height": 32, "frames": 5, "steps": 2, "seed": 3},
)  # fmt: skip


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return wanx.load(threads=1)


@pytest.fixture(scope="module")
def runs(pipeline: Pipeline) -> list[tuple[ResolvedRun, Inputs]]:
    options = [RunOptions(**video) for video in VIDEOS]  # type: ignore[arg-type]
    return [(resolve(each, pipeline.config, Inputs()), Inputs()) for each in options]


def test_networks_serve_one_run_after_the_other(
    pipeline: Pipeline, runs: list[tuple[ResolvedRun, Inputs]]
) -> None:
    """Nothing is left in a network of the run before, of another size and other branches."""
    parts = RunParts.of(pipeline.bundle, threads=1)
    done: list[int] = []
    encoded = parts.encode(runs, lambda: done.append(len(done)))
    assert done == [0, 1, 2]
    assert [[*run.contexts] for run in encoded] == [
        ["conditional", "unconditional"], ["conditional"], ["conditional", "unconditional"]
    ]  # fmt: skip
    with parts.session("dit") as session:
        latents = [parts.denoise(session, run.start()) for run in encoded]
    names = [f"vae_decoder_{part}" for part in ("mid_first", "mid_rest", "up_first", "up_rest")]
    with ExitStack() as stack:
        decoders = {name: stack.enter_context(parts.session(name)) for name in names}
        opened = RunParts(
            bundle=pipeline.bundle, open=lambda name, **_: nullcontext(decoders[name])
        )
        for video, latent in zip(VIDEOS, latents, strict=True):
            frames = np.concatenate(list(opened.decode(latent, FrameCheck.convert)))
            expected = pipeline(**video).frames  # type: ignore[arg-type]
            assert expected is not None
            assert np.array_equal(frames, expected)


def test_a_run_starts_anew_each_time(
    pipeline: Pipeline, runs: list[tuple[ResolvedRun, Inputs]]
) -> None:
    """From its own noise, or from another latent, which is left alone."""
    parts = RunParts.of(pipeline.bundle, threads=1)
    (run,) = parts.encode(runs[:1])
    other = replace(run, run=replace(run.run, seed=7)).start().latent
    kept = other.copy()
    with parts.session("dit") as session:
        first, again = (parts.denoise(session, run.start()) for _ in range(2))
        moved = parts.denoise(session, run.start(other))
    assert np.array_equal(first, again)
    assert np.array_equal(other, kept)
    assert not np.allclose(first, moved)


def test_steps_are_reported_until_one_is_not_finite(
    pipeline: Pipeline, runs: list[tuple[ResolvedRun, Inputs]]
) -> None:
    parts = RunParts.of(pipeline.bundle, threads=1)
    (run,) = parts.encode(runs[:1])
    broken = run.start()
    steps: list[int] = []

    def spoil(feeds: object, velocities: object) -> None:
        steps.append(broken.steps_done)
        broken.latent = np.full_like(broken.latent, np.nan)

    with (
        parts.session("dit") as session,
        pytest.raises(NonFiniteLatentError, match="after step 2 of 2"),
    ):
        parts.denoise(session, broken, spoil)
    assert steps == [1]
    assert broken.steps_done == 2
