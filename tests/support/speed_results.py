"""Results of made-up benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

from wanx.benchmarks.speed.results import Case, Memory, Results, Settings, Subject, Trial
from wanx.runtime.stages import Stage


def subject(label: str, **facts: object) -> Subject:
    """A bundle by its label."""
    known = {
        "label": label, "name": "tiny", "task": "t2v", "precision": "fp32", "target": "cpu",
        "hash": "ab" * 32, "size_bytes": 12_000_000, "engine_bytes": 200_000,
    }  # fmt: skip
    return Subject(**known | facts)


CASE = Case(
    width=64, height=48, frames=5, latent_frames=2, tokens=24, steps=3, prompt="a cat",
    guide_scale=5.0, shift=3.0, solver="unipc", seed=0,
)  # fmt: skip


def trial(
    subject: int, number: int, steps: Sequence[float], *, case: int = 0, others: float = 0.1
) -> Trial:
    """A trial with given seconds of each step, and ``others`` for everything else."""

    def stage(name: str, calls: Sequence[float], load: float = others) -> Stage:
        return Stage(
            name=name, load_seconds=load, seconds=sum(calls), calls=tuple(calls), peak_bytes=10**9
        )

    stages = (
        stage("text", [others, others]),
        stage("denoise", steps),
        stage("decode", [others, others]),
        stage("write", [others], load=0.0),
    )
    total = sum(part.load_seconds + part.seconds for part in stages)
    return Trial(
        subject=subject, case=case, round=number, cold_start_seconds=others,
        end_to_end_seconds=others + total, stages=stages,
        memory=Memory(interval_seconds=0.5, host_bytes=(10**8, 10**9)),
    )  # fmt: skip


def results(*trials: Trial, labels: Sequence[str] = ("one",), **facts: object) -> Results:
    """A benchmark of these trials."""
    known = {
        "created": "2026-01-01T00:00:00+00:00",
        "command": "wanx bench one",
        "environment": {"cpu": "a processor"},
        "settings": Settings(repeat=2, warm_up=1, baseline=0, threads=None),
        "subjects": tuple(subject(label) for label in labels),
        "cases": (CASE,),
    }
    return Results(**known | facts, trials=trials)
