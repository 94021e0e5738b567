"""Tables of quantised layers and of accuracy, on stdout."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from wanx.commands.display.generation import STDOUT

if TYPE_CHECKING:
    from wanx.accuracy.gates import Agreement
    from wanx.benchmarks.accuracy.comparison import Comparison
    from wanx.bundle.reader import Bundle

_MAX_LISTED = 10


def print_quantization(bundle: Bundle) -> None:
    """Say which layers of a bundle are 8-bit, which stayed high and why, and which suffer most."""
    for name, component in bundle.manifest.components.items():
        recipe = component.quantization
        if recipe is None:
            continue
        counts = ", ".join(f"{count} {kind}" for kind, count in recipe.verified_counts.items())
        kernels = ", ".join(f"{count} {kernel}" for kernel, count in recipe.kernels.items())
        STDOUT.print(
            f"{name}: {counts} layers, read back from the graph"
            + (f"; the target ran {kernels}" if kernels else "")
            + (f"; {recipe.kept_weights} as the source has them" if recipe.kept_weights else "")
        )
        for reason, count in Counter(recipe.unquantized_layers.values()).most_common(_MAX_LISTED):
            layers = [layer for layer, why in recipe.unquantized_layers.items() if why == reason]
            more = "" if count == 1 else f" and {count - 1} more"
            STDOUT.print(f"  kept high: {layers[0]}{more}, {reason}")
        sqnr_by_layer = {n: layer.sqnr_db for n, layer in recipe.layers.items()}
        worst = sorted((db, n) for n, db in sqnr_by_layer.items() if db is not None)[:_MAX_LISTED]
        if worst:
            table = Table("worst 8-bit layers", "SQNR", box=None, pad_edge=False)
            for db, layer in worst:
                table.add_row(f"  {layer}", f"{db:.1f} dB")
            STDOUT.print(table)


def print_golden(steps: Sequence[Agreement]) -> None:
    """List how close the golden steps are."""
    if not steps:
        return
    table = Table("golden step", "branch", "cosine", "SQNR", box=None, pad_edge=False)
    for step in steps:
        style = "" if step.cosine >= 0.99 else "red"
        table.add_row(
            f"{step.step} (timestep {step.timestep:g})",
            step.branch,
            Text(f"{step.cosine:.6f}", style),
            f"{step.sqnr_db:.1f} dB",
        )
    STDOUT.print(table)


def print_comparison(comparison: Comparison, files: Sequence[Path]) -> None:
    """Say how accurate a bundle is, the worst of all runs at a time, and which files say more."""
    for role, it in (("candidate", comparison.candidate), ("reference", comparison.reference)):
        STDOUT.print(f"{role} {it.folder}: {it.name} at {it.precision}, hash {it.hash[:12]}")
    table = Table("output", "cosine", "gate", "SQNR", "worst at", box=None, pad_edge=False)
    for output, (at, run) in _worst_per_output(comparison).items():
        gate = comparison.gates.of(at.component)
        cosine = Text(f"{at.cosine:.6f}", "" if at.cosine >= gate else "red")
        sqnr = "equal" if at.equal else f"{at.sqnr_db:.1f} dB"
        where = f"run {run}" + (f", step {at.step}" if at.step else "")
        table.add_row(output, cosine, f"{gate:g}", sqnr, where)
    STDOUT.print(table)
    clips = Table("video", "RMSE", "1 - SSIM", "temporal difference", box=None, pad_edge=False)
    for number, facts in enumerate(comparison.runs, 1):
        if facts.clip is not None:
            ours, ratios = facts.clip.candidate, facts.clip.ratios.values()
            figures = (ours.rmse, 1 - ours.ssim_min, ours.temporal_difference)
            cells = zip(figures, ratios, strict=True)
            clips.add_row(f"run {number}", *(f"{value:.3g} ({_times(r)})" for value, r in cells))
    if clips.row_count:
        STDOUT.print(clips)
        STDOUT.print("in brackets: as a multiple of what one ulp of noise does to the reference")
    for path in files:
        STDOUT.print(f"wrote {path}")
    for problem in comparison.problems:
        STDOUT.print(Text("fails", style="red"), problem)
    STDOUT.print("accurate enough" if comparison.passed else Text("not accurate enough", "red"))


def _worst_per_output(comparison: Comparison) -> dict[str, tuple[Agreement, int]]:
    """The worst agreement of each output over all runs, and the number of its run."""
    worst: dict[str, tuple[Agreement, int]] = {}
    for number, run in enumerate(comparison.runs, 1):
        for agreement in (*run.steps, *run.parts):
            so_far = worst.get(agreement.output)
            # The negation also puts what is not finite before everything else.
            if so_far is None or not (
                agreement.cosine >= so_far[0].cosine or math.isnan(so_far[0].cosine)
            ):
                worst[agreement.output] = agreement, number
    return worst


def _times(ratio: float | None) -> str:
    return "floor is 0" if ratio is None else f"{ratio:,.0f}x" if ratio >= 100 else f"{ratio:.3g}x"
