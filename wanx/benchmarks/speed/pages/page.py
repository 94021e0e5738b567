"""A benchmark as one HTML page that needs nothing beside itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wanx.benchmarks.report.html import fill, image_uri, require_packages
from wanx.benchmarks.speed.metrics import METRICS, Metric, amount, peak_bytes, speedup, spread
from wanx.benchmarks.speed.results import Results, pluralize
from wanx.benchmarks.speed.roofline.bounds import fraction_text
from wanx.benchmarks.speed.sweep import Sweep

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, eq=False)
class Still:
    """A frame of a video.

    Attributes:
        number: from 1.
        pixels: uint8 ``[H, W, 3]``.
    """

    number: int
    pixels: Pixels


# By subject and case.
Stills = Mapping[tuple[int, int], Sequence[Still]]


def render(results: Results, stills: Stills | None = None) -> str:
    """Write results as HTML: no scripts, no requests, readable on light and dark screens.

    Raises:
        EnvironmentMismatchError: the packages of ``wanx[report]`` are missing.
    """
    require_packages()
    return fill(
        Path(__file__).with_name("page.html.jinja"),
        results=results,
        cases=[_case(results, case, stills or {}) for case in range(len(results.cases))],
        rooflines=[_roofline(results, number) for number in range(len(results.rooflines))],
        agreements=results.agreements,
        sweeps=[_sweep(results, item) for item in results.sweep],
        metrics=METRICS,
        bytes=size,
        pluralize=pluralize,
    )


def size(count: float) -> str:
    """Bytes in decimal units."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def _case(results: Results, case: int, stills: Stills) -> dict[str, Any]:
    from markupsafe import Markup

    from wanx.benchmarks.speed.pages.plots import memory_plot, stage_plot, step_plot

    memory = memory_plot(results, case)
    measured = any(results.of(index, case) for index in range(len(results.subjects)))
    return {
        "facts": results.cases[case],
        "rows": _rows(results, case),
        "stages": Markup(stage_plot(results, case)) if measured else None,
        "steps": Markup(step_plot(results, case)) if measured else None,
        "memory": Markup(memory) if memory else None,
        "stills": [
            {
                "label": subject.label,
                "images": [
                    {"uri": image_uri(still.pixels), "number": still.number}
                    for still in stills[index, case]
                ],
            }
            for index, subject in enumerate(results.subjects)
            if (index, case) in stills
        ],
    }


def _rows(results: Results, case: int) -> list[dict[str, Any]]:
    subjects = range(len(results.subjects))
    rows: list[dict[str, Any]] = [
        {"name": metric.name, "cells": [_cell(results, metric, i, case) for i in subjects]}
        for metric in METRICS
    ]
    peaks = [peak_bytes(results, index, case) for index in subjects]
    for name in dict.fromkeys(name for found in peaks for name in found):
        cells = [
            {"value": size(found[name]) if name in found else "–", "range": "", "ratio": ""}
            for found in peaks
        ]
        rows.append({"name": f"peak memory, {name}", "cells": cells})
    return [row for row in rows if any(cell["value"] != "–" for cell in row["cells"])]


def _cell(results: Results, metric: Metric, subject: int, case: int) -> dict[str, str]:
    found = spread(results, metric, subject, case)
    ratio = speedup(results, metric, subject, case)
    return {
        "value": amount(found.median) if found else "–",
        "range": f"{amount(found.p10)} to {amount(found.p90)}" if found and found.count > 1 else "",
        "ratio": f"{ratio.median:.2f}×" if ratio else "–",
    }


def _roofline(results: Results, number: int) -> dict[str, Any]:
    from markupsafe import Markup

    from wanx.benchmarks.speed.pages.roofline_plot import roofline_plot

    found = results.rooflines[number]
    case = f", {results.cases[found.case].label}" if len(results.cases) > 1 else ""
    return {
        "label": f"{results.subjects[found.subject].label}{case}",
        "component": found.component,
        "sentence": found.sentence,
        "plot": Markup(roofline_plot(found, number)),
        "caption": f"Parts of a {found.unit}; on the line they are as fast as can be.",
        "parts": [
            {
                "name": part.name,
                "time": amount(part.seconds),
                "share": _percent(part.seconds, found.seconds),
                "flops": count(sum(part.flops.values()), "FLOP"),
                "bytes": size(part.bytes),
                "speed": count(sum(part.flops.values()) / part.seconds, "FLOP/s")
                if part.seconds
                else "–",
                "fraction": fraction_text(part.fraction),
                "bound": part.bound if part.least_seconds else "–",
            }
            for part in found.parts
        ],
        "operations": [
            {
                "name": operation.name,
                "part": operation.part,
                "shapes": operation.shapes,
                "calls": operation.calls,
                "share": f"{operation.share:.1%}",
            }
            for operation in found.operations
        ],
        "ceilings": ", ".join(
            f"{found.ceilings.high if kind == 'high' else kind} products {count(rate, 'FLOP/s')}"
            for kind, rate in found.ceilings.flops.items()
        )
        + f", copies {size(found.ceilings.bytes)}/s",
    }


def _percent(part: float | None, whole: float) -> str:
    return "–" if part is None else f"{part / whole:.1%}"


def count(value: float, unit: str) -> str:
    """An amount with three digits and a decimal prefix."""
    for prefix, factor in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}" if value else "–"


def _sweep(results: Results, sweep: Sweep) -> dict[str, Any]:
    from markupsafe import Markup

    from wanx.benchmarks.speed.pages.plots import sweep_plot

    points = []
    for point in sweep.points:
        measured = median(point.seconds)
        error = None if point.unseen is None else point.unseen / measured - 1
        points.append(
            {
                "label": point.label,
                "tokens": f"{point.tokens:,}",
                "measured": amount(measured),
                "unseen": amount(point.unseen),
                "error": "–" if error is None else f"{error:+.1%}",
            }
        )
    crossover = sweep.fit.crossover
    return {
        "label": results.subjects[sweep.subject].label,
        "facts": sweep,
        "crossover": f"; both terms are equal at {crossover:,.0f} tokens"
        if 0 < crossover < 1e7
        else "",
        "plot": Markup(sweep_plot(sweep)),
        "points": points,
        "predictions": [
            {"label": p.label, "tokens": f"{p.tokens:,}", "seconds": amount(p.seconds)}
            for p in sweep.predictions
        ],
    }
