"""Output of ``wanx run --dry-run``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

from wanx.commands.display.generation import STDOUT
from wanx.commands.display.lines import format_bytes, format_seconds

if TYPE_CHECKING:
    from wanx.runtime.memory.plan import StageMemory
    from wanx.runtime.run_plan import RunPlan


_STAGES = ("text", "condition", "denoise", "decode")


def print_run_plan(plan: RunPlan) -> None:
    """Say what each stage of a run would take."""
    run = plan.options
    STDOUT.print(
        f"{run.width}x{run.height}, {run.frames} frames, {run.steps} steps, "
        f"guidance scale {run.guide_scale}"
    )
    if plan.cache is not None:
        STDOUT.print(plan.cache.summary)
    if not plan.stages and not plan.seconds:
        STDOUT.print(
            "The networks run on another provider, whose memory and time are not predicted."
        )
        return
    columns = ("stage", "time", "memory", "of it mapped", "tiles")
    table = Table(*columns, box=None, pad_edge=False)
    for name, stage in _largest(plan).items():
        time = f"about {format_seconds(plan.seconds[name])}" if name in plan.seconds else ""
        memory, mapped, tiles = "", "", ""
        if stage is not None:
            memory = format_bytes(stage.total) + (" of the GPU" if stage.on_gpu else "")
            mapped, tiles = format_bytes(stage.weights), _tiles(stage)
        table.add_row(name, time, memory, mapped, tiles)
    STDOUT.print(table)


def run_plan_facts(plan: RunPlan) -> dict[str, Any]:
    """The same for ``--json``."""
    stages = []
    for name, stage in _largest(plan).items():
        facts: dict[str, Any] = {"name": name, "seconds": plan.seconds.get(name)}
        if stage is not None:
            facts |= {"gpu": stage.on_gpu, "bytes": stage.total, "mapped_bytes": stage.weights}
            if stage.vae:
                facts |= {"tiles": len(stage.vae.tiling.tiles), "work": stage.vae.tiling.overhead}
        stages.append(facts)
    return {"options": asdict(plan.options), "stages": stages}


def _largest(plan: RunPlan) -> dict[str, StageMemory | None]:
    """The stages by name in the order of a run, each with what takes most memory in it."""
    found: dict[str, StageMemory | None] = {}
    for name in _STAGES:
        parts = [stage for stage in plan.stages if stage.name == name]
        if parts or name in plan.seconds:
            found[name] = max(parts, key=lambda stage: stage.total, default=None)
    return found


def _tiles(stage: StageMemory) -> str:
    if stage.vae is None:
        return ""
    tiling = stage.vae.tiling
    if not stage.vae.in_tiles:
        return "none: whole frames"
    return f"{len(tiling.tiles)}, {tiling.overhead:.2f} times the work"
