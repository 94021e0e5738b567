"""Denoisers of both bundles, one after the other: the reference is recorded, then answered.

Free-running videos of two models part even if the models agree to the last bit but one. Fed the
same latents and the same text (teacher forcing), what differs at a step is the error of that step
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wanx.accuracy.gates import Agreement, agreement
from wanx.benchmarks.accuracy.step_recording import Feeds, StepRecording, Velocities
from wanx.errors import WanxError
from wanx.runtime.denoise import DenoisingRun, NonFiniteLatentError
from wanx.runtime.run_parts import EncodedRun, OnStep, RunParts
from wanx.runtime.sessions.base import Session

Float32 = NDArray[np.float32]
StepDone = Callable[[], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class ReferenceRun:
    """One run of the reference.

    Attributes:
        recording: feeds and velocities of each step.
        latent: clean, ``[C, T, h, w]``.
        ulp_baseline: likewise, from noise that is one ulp away; None unless clips are compared.
    """

    recording: StepRecording
    latent: Float32
    ulp_baseline: Float32 | None


@dataclass(frozen=True, kw_only=True, eq=False)
class CandidateRun:
    """The same run on the candidate.

    Attributes:
        steps: agreement at each step and branch, teacher-forced.
        latent: clean, from running freely; None unless clips are compared, or if not finite.
        problem: names the first of its own steps that is not finite.
    """

    steps: tuple[Agreement, ...]
    latent: Float32 | None = None
    problem: str | None = None


def run_reference(
    reference: RunParts, runs: Sequence[EncodedRun], folder: Path, *, clips: bool, on_step: StepDone
) -> list[ReferenceRun]:
    """Run the reference, keeping its steps under ``folder``.

    Raises:
        WanxError: it is not finite itself, or the disk is full.
    """
    results = []
    with reference.session("dit") as session:
        for number, run in enumerate(runs):
            recording = StepRecording(folder / str(number))

            def record(
                feeds: Feeds, velocities: Velocities, recording: StepRecording = recording
            ) -> None:
                recording.append(feeds, velocities)
                on_step()

            latent = _sample(reference, session, run.start(), record)
            baseline = None
            if clips:
                shifted = run.start(plus_one_ulp(run.start().latent))
                baseline = _sample(reference, session, shifted, lambda *_: on_step())
            results.append(ReferenceRun(recording=recording, latent=latent, ulp_baseline=baseline))
    return results


def run_candidate(
    candidate: RunParts,
    runs: Sequence[EncodedRun],
    reference_runs: Sequence[EncodedRun],
    references: Sequence[ReferenceRun],
    *,
    clips: bool,
    on_step: StepDone,
) -> list[CandidateRun]:
    """Put the reference's steps to the candidate, then let it run freely.

    Args:
        candidate: the bundle in question.
        runs: the runs as its own encoders see them.
        reference_runs: the runs as the reference's encoders see them.
        references: from :func:`run_reference`.
        clips: whether it is to run freely too.
        on_step: called after each step of either kind.
    """
    results = []
    with candidate.session("dit") as session:
        for run, teacher, reference in zip(runs, reference_runs, references, strict=True):
            steps = _teacher_forced(session, teacher, reference.recording, on_step)
            if not clips:
                results.append(CandidateRun(steps=steps))
                continue
            denoising = run.start()
            latent = problem = None
            try:
                latent = candidate.denoise(session, denoising, lambda *_: on_step())
            except NonFiniteLatentError:
                problem = (
                    f"the latent is not finite after step {denoising.steps_done} of "
                    f"{denoising.steps}"
                )
            results.append(CandidateRun(steps=steps, latent=latent, problem=problem))
    return results


def plus_one_ulp(values: Float32) -> Float32:
    """The next float32 above each value."""
    return np.nextafter(values, np.float32(np.inf))


def _sample(
    reference: RunParts, session: Session, denoising: DenoisingRun, on_step: OnStep
) -> Float32:
    try:
        return reference.denoise(session, denoising, on_step)
    except NonFiniteLatentError:
        raise WanxError(
            f"the latent of the reference is not finite after step {denoising.steps_done} of "
            f"{denoising.steps}, so nothing can be compared with it; check the bundle with "
            "`wanx verify` or export it at a higher precision"
        ) from None


def _teacher_forced(
    session: Session, teacher: EncodedRun, recording: StepRecording, on_step: StepDone
) -> tuple[Agreement, ...]:
    session.bind(teacher.start().constants)
    agreements = []
    for number, feeds, velocities in recording:
        for branch, velocity in velocities.items():
            answer = session.run(feeds | {"context": teacher.contexts[branch]})["velocity"]
            agreements.append(
                agreement(
                    answer,
                    velocity,
                    component="dit",
                    branch=branch,
                    step=number,
                    timestep=float(feeds["timestep"][0]),
                )
            )
        on_step()
    return tuple(agreements)
