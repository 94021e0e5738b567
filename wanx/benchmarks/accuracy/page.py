"""A comparison as one HTML page that needs nothing beside itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wanx.accuracy.gates import worst
from wanx.accuracy.metrics import psnr_db
from wanx.benchmarks.accuracy.clips import Still
from wanx.benchmarks.accuracy.comparison import Comparison, RunComparison
from wanx.benchmarks.report.html import fill, image_uri, require_packages

_AMPLIFICATIONS = (64, 32, 16, 8, 4, 2, 1)

Pixels = NDArray[np.uint8]


def render(comparison: Comparison) -> str:
    """Write a comparison as HTML: no scripts, no requests, readable on light and dark screens.

    Raises:
        EnvironmentMismatchError: the packages of ``wanx[report]`` are missing.
    """
    require_packages()
    from markupsafe import Markup

    from wanx.benchmarks.accuracy.plots import MOST_LAYERS, cosine_plot, layer_plot, sqnr_plot

    gates, layers = comparison.gates, comparison.layers
    return fill(
        Path(__file__).with_name("page.html.jinja"),
        worst=worst,
        comparison=comparison,
        gates=gates,
        runs=[
            {
                "facts": run,
                "cosines": Markup(cosine_plot(run, gates.dit)),
                "sqnr": Markup(sqnr_plot(run)),
                "stills": _stills(run),
            }
            for run in comparison.runs
        ],
        layers=Markup(layer_plot(layers, comparison.layer_gate_db)) if layers else None,
        layers_shown=min(len(layers), MOST_LAYERS),
    )


def _stills(run: RunComparison) -> dict[str, Any] | None:
    """Images and captions of the chosen frames, and by how much their differences are amplified."""
    if run.clip is None:
        return None
    stills = run.clip.stills
    factor = _amplification(stills)
    return {
        "factor": factor,
        "rows": [
            {
                "label": still.label,
                "index": still.index,
                "reference": image_uri(still.reference),
                "candidate": image_uri(still.candidate),
                "psnr": _psnr(still.candidate, still.reference),
                "difference": image_uri(_difference(still.candidate, still.reference, factor)),
                "floor": image_uri(_difference(still.ulp_baseline, still.reference, factor)),
                "floor_psnr": _psnr(still.ulp_baseline, still.reference),
            }
            for still in stills
        ],
    }


def _amplification(stills: tuple[Still, ...]) -> int:
    """The largest factor that leaves all but a hundredth of the candidate's errors unclipped."""
    errors = np.concatenate([_error(s.candidate, s.reference).ravel() for s in stills])
    high = float(np.percentile(errors, 99))
    return next(factor for factor in _AMPLIFICATIONS if high * factor <= 255)


def _error(image: Pixels, reference: Pixels) -> NDArray[np.int16]:
    return np.abs(np.subtract(image, reference, dtype=np.int16))


def _difference(image: Pixels, reference: Pixels, factor: int) -> Pixels:
    return np.minimum(_error(image, reference).astype(np.int32) * factor, 255).astype(np.uint8)


def _psnr(image: Pixels, reference: Pixels) -> float:
    return float(psnr_db(image[None], reference[None])[0])
