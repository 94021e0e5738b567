"""Plots as inline SVG that takes the text colour of the page around it."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Readable on light and on dark, and told apart by the colour-blind.
COLORS = ("#3b82f6", "#f59e0b", "#10b981", "#a855f7", "#ec4899", "#64748b", "#84cc16", "#0ea5e9")
BAD = "#e5484d"
_WIDTH = 7.2  # inches; the page scales it
# Placeholder that becomes the page's own text colour, for light and dark pages alike.
_INK = "#010203"
_STYLE: Any = {
    "font.size": 9,
    "svg.fonttype": "path",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK
    ),
    "grid.color": _INK,
}


def svg(name: str, height: float, draw: Callable[[Axes], None]) -> str:
    """Draw a figure of ``height`` inches; ``name`` is unique on the page."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # Names that matplotlib gives to its parts are hashed with the salt, so that the plots of one
    # page do not take each other's; the rest of the names serve nobody.
    with rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        draw(axes)
        stream = io.StringIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")  # in a folder's name
            figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    _, _, svg = stream.getvalue().partition("<svg ")
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    return "<svg " + svg.replace(_INK, "currentColor")


def plain(name: str, most: int = 60) -> str:
    """A name from a file, of ``most`` characters, that is not taken for a formula."""
    cut = name if len(name) <= most else f"{name[: most - 1]}…"
    return cut.replace("$", r"\$")


def legend(axes: Axes, columns: int = 4) -> None:
    """Put a legend above the plot."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2)
