"""Pages of HTML without scripts or requests, readable on light and on dark screens."""

from __future__ import annotations

import base64
import io
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wanx.errors import EnvironmentMismatchError
from wanx.version import __version__

PACKAGES = ("jinja2", "matplotlib")
_WIDEST = 480  # pixels of a frame on the page


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


def fill(template: Path, **facts: Any) -> str:
    """Fill a template, which may extend ``base.html.jinja`` beside this file.

    Raises:
        EnvironmentMismatchError: the packages of ``wanx[report]`` are missing.
    """
    require_packages()
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": _number, "ratio": _ratio}
    return environment.get_template(template.name).render(version=__version__, **facts)


def image_uri(pixels: NDArray[np.uint8]) -> str:
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
