"""Presets of a run: solver, noise levels and guidance that a distilled model was made for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from wanx.config.models import Task

_ALL: tuple[Task, ...] = ("t2v", "i2v", "flf2v", "vace")


@dataclass(frozen=True, kw_only=True)
class RunPreset:
    """Options of a run that belong together.

    Attributes:
        name: on the command line.
        solver: of the steps.
        steps: number of them; left out where ``timesteps`` are given.
        timesteps: what the model is fed, from 1000 down, before ``warp``.
        warp: whether the shift applies to the timesteps.
        sigmas: noise levels, where they are not a thousandth of the timesteps.
        shift: of the noise schedule.
        guide_scale: 1 is a forward a step.
        tasks: that it is for.
        marks: parts of the names of files, in small letters, by which such a model is known.
        source: of the facts.
    """

    name: str
    solver: str
    steps: int | None = None
    timesteps: tuple[float, ...] = ()
    warp: bool = False
    sigmas: tuple[float, ...] = ()
    shift: float | None = None
    guide_scale: float = 1.0
    tasks: tuple[Task, ...] = _ALL
    marks: tuple[str, ...] = ()
    source: str

    @property
    def count(self) -> int:
        """Number of steps."""
        return self.steps or len(self.timesteps)


def _nearest(timesteps: tuple[float, ...], shift: float) -> tuple[float, ...]:
    """Levels of a table of 1000 shifted ones that are nearest to timesteps."""
    table = [shift * u / (1 + (shift - 1) * u) for u in (i / 1000 for i in range(1, 1001))]
    return tuple(min(table, key=lambda level: abs(1000 * level - t)) for t in timesteps)


_FASTWAN = (1000.0, 757.0, 522.0)

RUN_PRESETS: dict[str, RunPreset] = {
    preset.name: preset
    for preset in (
        RunPreset(
            name="lightx2v-4step", solver="euler", timesteps=(1000, 750, 500, 250), warp=True,
            shift=5.0, marks=("lightx2v", "lightning", "stepdistill", "step_distill"),
            source="lightx2v/models/schedulers/wan/step_distill/scheduler.py",
        ),
        RunPreset(
            name="lightx2v-8step", solver="euler",
            timesteps=(1000, 875, 750, 625, 500, 375, 250, 125), warp=True, shift=5.0,
            source="ModelTC/LightX2V-Wan2.2-Lightning, issue 3",
        ),
        RunPreset(
            name="causvid", solver="euler",
            timesteps=(999, 934, 862, 756, 603, 410, 250, 140, 74), marks=("causvid",),
            source="kijai/ComfyUI-WanVideoWrapper, wanvideo/schedulers",
        ),
        RunPreset(
            name="causvid-4step", solver="lcm", timesteps=(1000, 750, 500, 250),
            source="tianweiy/CausVid, 1.3B",
        ),
        RunPreset(
            name="accvid", solver="unipc", steps=10, shift=5.0, marks=("accvid",),
            source="aejion/AccVideo: shift 5; the number of steps is users'",
        ),
        RunPreset(
            name="fusionx", solver="unipc", steps=8, shift=2.0, marks=("fusionx", "fusionix"),
            source="deepbeepmeep/Wan2GP, profiles of FusionX",
        ),
        RunPreset(
            name="fastwan", solver="lcm", timesteps=_FASTWAN, sigmas=_nearest(_FASTWAN, 8.0),
            tasks=("t2v",), marks=("fastwan",),
            source="hao-ai-lab/FastVideo, fastvideo/pipelines/stages/denoising.py",
        ),
        *(
            RunPreset(
                name=f"rcm-{steps}", solver="rcm", steps=steps, tasks=("t2v", "i2v"),
                marks=("rcm", "turbodiffusion", "turbowan") if steps == 4 else (),
                source="NVlabs/rcm, rcm/inference",
            )
            for steps in (4, 2, 1)
        ),
        RunPreset(
            name="tiny-4step", solver="euler", timesteps=(1000, 750, 500, 250), warp=True,
            shift=3.0, tasks=("t2v",), marks=("tiny-4step",),
            source="tools/tiny/distill.py",
        ),
    )
}  # fmt: skip


def suggest_preset(names: Iterable[str], task: Task) -> tuple[str, RunPreset] | None:
    """Give the first name that looks like that of a distilled model, and its preset.

    Args:
        names: of files of weights and LoRAs, or of the source.
        task: of the model.
    """
    for name in names:
        for preset in RUN_PRESETS.values():
            if task in preset.tasks and any(mark in name.lower() for mark in preset.marks):
                return name, preset
    return None
