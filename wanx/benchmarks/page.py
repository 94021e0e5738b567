"""A comparison as one HTML page that needs nothing beside itself."""

from __future__ import annotations

import base64
import io
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wanx.benchmarks.clips import Still
from wanx.benchmarks.comparison import Comparison, RunComparison, worst
from wanx.benchmarks.metrics import psnr_db
from wanx.errors import EnvironmentMismatchError

PACKAGES = ("jinja2", "matplotlib")
_TEMPLATE = Path(__file__).with_name("page.html.jinja")
_WIDEST = 480  # pixels of a frame on the page
_AMPLIFICATIONS = (64, 32, 16, 8, 4, 2, 1)

Pixels = NDArray[np.uint8]


def require_packages() -> None:
    """Check that what a page needs beyond the runtime is installed.

    Raises:
        EnvironmentMismatchError: packages are missing.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise EnvironmentMismatchError(
            f"a report needs {', '.join(missing)}, which this environment lacks: "
            "pip install 'wanx[report]'"
        )


def render(comparison: Comparison) -> str:
    """Write a comparison as HTML: no scripts, no requests, readable on light and dark screens.

    Raises:
        EnvironmentMismatchError: the packages of ``wanx[report]`` are missing.
    """
    require_packages()
    import jinja2
    from markupsafe import Markup

    import wanx
    from wanx.benchmarks.plots import MOST_LAYERS, cosine_plot, layer_plot, sqnr_plot

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": _number, "ratio": _ratio, "worst": worst}
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    gates, layers = comparison.gates, comparison.layers
    return template.render(
        version=wanx.__version__,
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
                "reference": _image(still.reference),
                "candidate": _image(still.candidate),
                "psnr": _psnr(still.candidate, still.reference),
                "difference": _image(_difference(still.candidate, still.reference, factor)),
                "floor": _image(_difference(still.floor, still.reference, factor)),
                "floor_psnr": _psnr(still.floor, still.reference),
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


def _image(pixels: Pixels) -> str:
    """A data URI: small frames as they are, large ones smaller and compressed."""
    from PIL import Image

    image = Image.fromarray(pixels)
    stream = io.BytesIO()
    if image.width <= _WIDEST:
        image.save(stream, "PNG", optimize=True)
        kind = "png"
    else:
        height = max(1, round(image.height * _WIDEST / image.width))
        image = image.resize((_WIDEST, height), Image.Resampling.BOX)
        image.save(stream, "JPEG", quality=90, subsampling=0)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if math.isfinite(value) else "not finite"


def _ratio(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}×" if value >= 100 else f"{value:.3g}×"
