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

from wanx.accuracy.gates import Agreement, agreement
from wanx.benchmarks.accuracy.step_recording import Feeds, Tape, Velocities
from wanx.benchmarks.accuracy.subject import Side, Start, denoise
from wanx.errors import WanxError
from wanx.runtime.sessions.base import Session

Float32 = NDArray[np.float32]
Tick = Callable[[], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Lesson:
    """What the reference did in one run.

    Attributes:
        tape: what it was fed and answered at each step.
        latent: where it arrived, ``[C, T, h, w]``.
        floor: where it arrived from noise that is one ulp away; None if nobody asked.
    """

    tape: Tape
    latent: Float32
    floor: Float32 | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """What the candidate made of it.

    Attributes:
        steps: agreement at each step and branch, teacher-forced.
        latent: where it arrived on its own; None if nobody asked, or if it is not finite.
        problem: which of its own steps was not finite.
    """

    steps: tuple[Agreement, ...]
    latent: Float32 | None = None
    problem: str | None = None


def record(
    reference: Side, starts: Sequence[Start], folder: Path, *, clips: bool, on_step: Tick
) -> list[Lesson]:
    """Run the reference, keeping its steps under ``folder``.

    Raises:
        WanxError: it is not finite itself, or the disk is full.
    """
    lessons = []
    with reference.open("dit") as session:
        for number, start in enumerate(starts):
            tape = Tape(folder / str(number))
            latent = _arrive(session, start, False, on_step, tape)
            floor = _arrive(session, start, True, on_step) if clips else None
            lessons.append(Lesson(tape=tape, latent=latent, floor=floor))
    return lessons


def answer(
    candidate: Side,
    starts: Sequence[Start],
    teachers: Sequence[Start],
    lessons: Sequence[Lesson],
    *,
    clips: bool,
    on_step: Tick,
) -> list[Answer]:
    """Put the reference's steps to the candidate, then let it run freely.

    Args:
        candidate: the bundle in question.
        starts: the runs as its own encoders see them.
        teachers: the runs as the reference's encoders see them.
        lessons: from :func:`record`.
        clips: whether it is to run freely too.
        on_step: called after each step of either kind.
    """
    answers = []
    with candidate.open("dit") as session:
        for start, teacher, lesson in zip(starts, teachers, lessons, strict=True):
            steps = _replay(session, teacher, lesson.tape, on_step)
            if not clips:
                answers.append(Answer(steps=steps))
                continue
            video = start.trajectory()
            latent = denoise(session, video, lambda *_: on_step())
            problem = None
            if latent is None:
                problem = f"the latent is not finite after step {video.step} of {video.steps}"
            answers.append(Answer(steps=steps, latent=latent, problem=problem))
    return answers


def _arrive(
    session: Session, start: Start, nudged: bool, on_step: Tick, tape: Tape | None = None
) -> Float32:
    def see(feeds: Feeds, velocities: Velocities) -> None:
        if tape is not None:
            tape.append(feeds, velocities)
        on_step()

    video = start.trajectory(nudged=nudged)
    latent = denoise(session, video, see)
    if latent is None:
        raise WanxError(
            f"the latent of the reference is not finite after step {video.step} of {video.steps}, "
            "so nothing can be compared with it; check the bundle with `wanx verify` or export it "
            "at a higher precision"
        )
    return latent


def _replay(session: Session, teacher: Start, tape: Tape, on_step: Tick) -> tuple[Agreement, ...]:
    session.bind(teacher.trajectory().constants)
    found = []
    for number, (feeds, velocities) in enumerate(tape, 1):
        for branch, velocity in velocities.items():
            answered = session.run(feeds | {"context": teacher.contexts[branch]})["velocity"]
            found.append(
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
    return tuple(found)
