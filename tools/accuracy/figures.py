"""Measure the built-in model at a precision: accuracy, what it draws, what is 8-bit, its size.

Every network runs on one thread, so that a figure depends on the processor alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data import split_scenes
from drawings import Drawings, draw

import wanx
from wanx.accuracy.gates import Agreement, worst
from wanx.accuracy.golden_check import check_golden
from wanx.benchmarks.accuracy.comparison import Comparison
from wanx.bundle.reader import Bundle

PRECISIONS = ("fp32", "int8", "fp8")
_BY_TIME = ("fp32", "fp8", "int8")  # fp8 is emulated; fp32 is what others are compared with
COMPARED = 3  # held-out prompts
SEED = 1000

Export = Callable[[str, Path], Bundle]
Figures = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was found of one precision.

    Attributes:
        figures: by name; :mod:`envelopes` says which way is better.
        golden: of every golden step and branch.
        comparison: with the fp32 bundle; None for fp32 itself.
        drawings: what the detector saw.
    """

    figures: Figures
    golden: tuple[Agreement, ...]
    comparison: Comparison | None
    drawings: Drawings


def measure_all(export: Export, folder: Path) -> dict[str, Measured]:
    """Export the built-in model at every precision and measure each.

    One is measured while the next one is exported.

    Args:
        export: writes the bundle of a precision to a path, with default options.
        folder: for the bundles, ``<precision>`` each.
    """
    bundles: dict[str, Bundle] = {}
    drawn: dict[str, Future[Drawings]] = {}
    compared: dict[str, Future[Comparison]] = {}
    with ThreadPoolExecutor(max_workers=2) as pool:
        for precision in _BY_TIME:
            bundle = bundles[precision] = export(precision, folder / precision)
            if precision != "fp32":
                compared[precision] = pool.submit(compare, bundle, bundles["fp32"])
            drawn[precision] = pool.submit(draw, bundle, first_seed=SEED)
    return {
        precision: _measured(
            bundles[precision],
            drawn[precision].result(),
            compared[precision].result() if precision in compared else None,
        )
        for precision in PRECISIONS
    }


def _measured(bundle: Bundle, drawings: Drawings, comparison: Comparison | None) -> Measured:
    golden = check_golden(bundle, threads=1)
    figures = golden_figures(golden) | drawings.figures
    if comparison is not None:
        figures |= comparison_figures(comparison) | layer_figures(bundle)
    figures["megabytes"] = bundle.size_bytes / 1e6
    return Measured(figures=figures, golden=golden, comparison=comparison, drawings=drawings)


def golden_figures(steps: tuple[Agreement, ...]) -> Figures:
    """The golden step that is answered worst."""
    return {
        "golden cosine": worst(steps).cosine,
        "golden SQNR": min(
            (s.sqnr_db for s in steps), key=lambda db: db if db == db else -math.inf
        ),
    }


def compare(bundle: Bundle, reference: Bundle) -> Comparison:
    """Put a few held-out prompts to a bundle and to the fp32 one."""
    path = bundle.root.with_suffix(".jsonl")
    lines = [
        json.dumps({"prompt": scene.caption, "seed": SEED + number})
        for number, scene in enumerate(split_scenes()[1][:COMPARED])
    ]
    path.write_text("\n".join(lines))
    return wanx.compare(bundle.root, reference.root, prompts=path, threads=1)


def comparison_figures(comparison: Comparison) -> Figures:
    """The worst of all runs: of teacher-forced steps, of text, and of whole videos."""
    steps = [step for run in comparison.runs for step in run.steps]
    parts = [part for run in comparison.runs for part in run.parts]
    clips = [run.clip.candidate for run in comparison.runs if run.clip is not None]
    return {
        "cosine conditional": worst([s for s in steps if s.branch == "conditional"]).cosine,
        "cosine unconditional": worst([s for s in steps if s.branch == "unconditional"]).cosine,
        "cosine text": worst([p for p in parts if p.component == "text_encoder"]).cosine,
        "clip PSNR": min((clip.psnr_db_min for clip in clips), default=0.0),
        "clip SSIM": min((clip.ssim_min for clip in clips), default=0.0),
    }


def layer_figures(bundle: Bundle) -> Figures:
    """How many layers are 8-bit, read back from the graphs, and how many stayed high."""
    recipes = [
        component.quantization
        for component in bundle.manifest.components.values()
        if component.quantization is not None
    ]
    return {
        "8-bit layers": sum(sum(recipe.verified_counts.values()) for recipe in recipes),
        "layers kept high": sum(len(recipe.unquantized_layers) for recipe in recipes),
    }
