"""Output of ``wanx run --dry-run``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

from wanx.commands.display.generation import STDOUT
from wanx.commands.display.lines import format_bytes

if TYPE_CHECKING:
    from wanx.runtime.memory.plan import RunPlan, StageMemory


def print_run_plan(plan: RunPlan) -> None:
    """Say what each stage of a run would take."""
    run = plan.options
    STDOUT.print(
        f"{run.width}x{run.height}, {run.frames} frames, {run.steps} steps, "
        f"guidance scale {run.guide_scale:g}"
    )
    if not plan.stages:
        STDOUT.print("The networks run on another provider, whose memory is not predicted.")
        return
    table = Table("stage", "memory", "of it mapped files", "tiles", box=None, pad_edge=False)
    for stage in plan.stages:
        table.add_row(
            stage.name, format_bytes(stage.total) + (" of the GPU" if stage.on_gpu else ""),
            format_bytes(stage.weights), _tiles(stage),
        )  # fmt: skip
    STDOUT.print(table)


def run_plan_facts(plan: RunPlan) -> dict[str, Any]:
    """The same for ``--json``."""
    stages = [
        {"name": stage.name, "gpu": stage.on_gpu}
        | {"bytes": stage.total, "mapped_bytes": stage.weights}
        | ({"tiles": len(stage.vae.tiling.tiles), "work": stage.vae.tiling.overhead}
           if stage.vae else {})
        for stage in plan.stages
    ]  # fmt: skip
    return {"options": asdict(plan.options), "stages": stages}


def _tiles(stage: StageMemory) -> str:
    if stage.vae is None:
        return ""
    tiling = stage.vae.tiling
    if not stage.vae.in_tiles:
        return "none: whole frames"
    return f"{len(tiling.tiles)}, {tiling.overhead:.2f} times the work of whole frames"
