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
from wanx.benchmarks.speed.metrics import METRICS, Spread, amount, metric_rows, peak_rows
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
    rows: list[dict[str, Any]] = [
        {"name": metric.name, "cells": [_cell(*figure) for figure in figures]}
        for metric, figures in metric_rows(results, case)
    ]
    for name, peaks in peak_rows(results, case):
        values = ["–" if peak is None else size(peak) for peak in peaks]
        cells = [{"value": value, "range": "", "ratio": ""} for value in values]
        rows.append({"name": f"peak memory, {name}", "cells": cells})
    return rows


def _cell(seconds: Spread | None, ratio: Spread | None) -> dict[str, str]:
    several = seconds is not None and seconds.count > 1
    return {
        "value": amount(seconds.median) if seconds else "–",
        "range": f"{amount(seconds.p10)} to {amount(seconds.p90)}" if seconds and several else "",
        "ratio": f"{ratio.median:.2f}×" if ratio else "–",
    }


def _roofline(results: Results, number: int) -> dict[str, Any]:
    from markupsafe import Markup

    from wanx.benchmarks.speed.pages.roofline_plot import roofline_plot

    roofline = results.rooflines[number]
    case = f", {results.cases[roofline.case].label}" if len(results.cases) > 1 else ""
    return {
        "label": f"{results.subjects[roofline.subject].label}{case}",
        "component": roofline.component,
        "sentence": roofline.sentence,
        "plot": Markup(roofline_plot(roofline, number)),
        "caption": f"Parts of a {roofline.unit}; on the line they are as fast as can be.",
        "parts": [
            {
                "name": part.name,
                "time": amount(part.seconds),
                "share": _percent(part.seconds, roofline.seconds),
                "flops": count(sum(part.flops.values()), "FLOP"),
                "bytes": size(part.bytes),
                "speed": count(sum(part.flops.values()) / part.seconds, "FLOP/s")
                if part.seconds
                else "–",
                "fraction": fraction_text(part.fraction),
                "bound": part.bound if part.least_seconds else "–",
            }
            for part in roofline.parts
        ],
        "operations": [
            {
                "name": operation.name,
                "part": operation.part,
                "shapes": operation.shapes,
                "calls": operation.calls,
                "share": f"{operation.share:.1%}",
            }
            for operation in roofline.operations
        ],
        "ceilings": ", ".join(
            f"{roofline.ceilings.high if kind == 'high' else kind} products {count(rate, 'FLOP/s')}"
            for kind, rate in roofline.ceilings.flops.items()
        )
        + f", copies {size(roofline.ceilings.bytes)}/s",
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
