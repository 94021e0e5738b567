"""The denoisers of both bundles, one after the other: the reference records, the candidate answers.

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

from wanx.benchmarks.accuracy.comparison import Agreement, agreement
from wanx.benchmarks.accuracy.step_recording import Feeds, StepRecording, Velocities
from wanx.benchmarks.accuracy.subject import Side, Start, denoise
from wanx.errors import WanxError
from wanx.runtime.sessions.base import Session

Float32 = NDArray[np.float32]
OnStep = Callable[[], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class ReferenceRun:
    """One run of the reference.

    Attributes:
        recording: what it was fed and answered at each step.
        latent: where it arrived, ``[C, T, h, w]``.
        ulp_baseline: where it arrived from noise that is one ulp away; None if nobody asked.
    """

    recording: StepRecording
    latent: Float32
    ulp_baseline: Float32 | None


@dataclass(frozen=True, kw_only=True, eq=False)
class CandidateRun:
    """The same run of the candidate.

    Attributes:
        steps: agreement at each step and branch, teacher-forced.
        latent: where it arrived on its own; None if nobody asked, or if it is not finite.
        problem: which of its own steps was not finite.
    """

    steps: tuple[Agreement, ...]
    latent: Float32 | None = None
    problem: str | None = None


def record_reference(
    reference: Side, starts: Sequence[Start], folder: Path, *, clips: bool, on_step: OnStep
) -> list[ReferenceRun]:
    """Run the reference, keeping its steps under ``folder``.

    Raises:
        WanxError: it is not finite itself, or the disk is full.
    """
    recordings = []
    with reference.open("dit") as session:
        for number, start in enumerate(starts):
            recording = StepRecording(folder / str(number))
            latent = _sample(session, start, False, on_step, recording)
            ulp_baseline = _sample(session, start, True, on_step) if clips else None
            recordings.append(
                ReferenceRun(recording=recording, latent=latent, ulp_baseline=ulp_baseline)
            )
    return recordings


def run_candidate(
    candidate: Side,
    starts: Sequence[Start],
    teachers: Sequence[Start],
    recordings: Sequence[ReferenceRun],
    *,
    clips: bool,
    on_step: OnStep,
) -> list[CandidateRun]:
    """Put the reference's steps to the candidate, then let it run freely.

    Args:
        candidate: the bundle in question.
        starts: the runs as its own encoders see them.
        teachers: the runs as the reference's encoders see them.
        recordings: from :func:`record_reference`.
        clips: whether it is to run freely too.
        on_step: called after each step of either kind.
    """
    runs = []
    with candidate.open("dit") as session:
        for start, teacher, recorded in zip(starts, teachers, recordings, strict=True):
            steps = _teacher_forced(session, teacher, recorded.recording, on_step)
            if not clips:
                runs.append(CandidateRun(steps=steps))
                continue
            video = start.trajectory()
            latent = denoise(session, video, lambda *_: on_step())
            problem = None
            if latent is None:
                problem = f"the latent is not finite after step {video.step} of {video.steps}"
            runs.append(CandidateRun(steps=steps, latent=latent, problem=problem))
    return runs


def _sample(
    session: Session,
    start: Start,
    plus_one_ulp: bool,
    on_step: OnStep,
    recording: StepRecording | None = None,
) -> Float32:
    def see(feeds: Feeds, velocities: Velocities) -> None:
        if recording is not None:
            recording.append(feeds, velocities)
        on_step()

    video = start.trajectory(nudged=plus_one_ulp)
    latent = denoise(session, video, see)
    if latent is None:
        raise WanxError(
            f"the latent of the reference is not finite after step {video.step} of {video.steps}, "
            "so nothing can be compared with it; check the bundle with `wanx verify` or export it "
            "at a higher precision"
        )
    return latent


def _teacher_forced(
    session: Session, teacher: Start, recording: StepRecording, on_step: OnStep
) -> tuple[Agreement, ...]:
    session.bind(teacher.trajectory().constants)
    agreements = []
    for number, (feeds, velocities) in enumerate(recording, 1):
        for branch, velocity in velocities.items():
            answered = session.run(feeds | {"context": teacher.contexts[branch]})["velocity"]
            agreements.append(
                agreement(
                    answered,
                    velocity,
                    component="dit",
                    branch=branch,
                    step=number,
                    timestep=float(feeds["timestep"][0]),
                )
            )
        on_step()
    return tuple(agreements)
