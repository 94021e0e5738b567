"""Plots of a comparison as inline SVG that takes the text colour of the page around it."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from wanx.benchmarks.comparison import Agreement, RunComparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_LAYERS = 40

_WIDTH = 7.2  # inches; the page scales it
_EXACT = 1e-9  # stands for 0 on a logarithmic axis
# Placeholder that becomes the page's own text colour, for light and dark pages alike.
_INK = "#010203"
_GATE = "#e5484d"
_SERIES = (("#3b82f6", "o", "-"), ("#f59e0b", "s", "--"))
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


def cosine_plot(run: RunComparison, gate: float) -> str:
    """Draw 1 - cosine of the velocity over the steps, on a logarithmic axis, with its gate."""

    def draw(axes: Axes) -> None:
        _lines(axes, run.branches, lambda at: max(1 - at.cosine, _EXACT))
        axes.set_yscale("log")
        axes.axhline(1 - gate, color=_GATE, linewidth=1, label=f"gate {gate:g}")
        axes.set_ylabel("1 − cosine")
        axes.margins(y=0.15)
        _legend(axes)

    return _svg("cosine", 2.9, draw)


def sqnr_plot(run: RunComparison) -> str:
    """Draw the signal-to-noise ratio of the velocity over the steps."""

    def draw(axes: Axes) -> None:
        _lines(axes, run.branches, lambda at: at.sqnr_db)
        axes.set_ylabel("SQNR (dB)")
        axes.margins(y=0.15)
        _legend(axes)

    return _svg("sqnr", 2.9, draw)


def layer_plot(layers: Mapping[str, float], gate_db: float | None) -> str:
    """Draw the worst layers as bars, the worst at the top, with their gate."""
    chosen = sorted(layers.items(), key=lambda item: item[1])[:MOST_LAYERS]

    def draw(axes: Axes) -> None:
        names, values = zip(*chosen, strict=True)
        low = [gate_db is not None and not value >= gate_db for value in values]
        places = range(len(names))
        axes.barh(
            places, values, color=[_GATE if bad else _SERIES[0][0] for bad in low], height=0.7
        )
        axes.set_yticks(places, [_plain(name) for name in names])
        axes.invert_yaxis()
        axes.margins(y=0.01)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("SQNR of the layer's output (dB)")
        if gate_db is not None:
            axes.axvline(gate_db, color=_GATE, linewidth=1, label=f"gate {gate_db:g} dB")
            _legend(axes)

    return _svg("layers", 0.9 + 0.19 * len(chosen), draw)


def _lines(axes: Axes, branches: Mapping[Any, Sequence[Agreement]], value: Any) -> None:
    """A line for each branch, with a gap and a cross where the velocity is not finite."""
    from matplotlib.ticker import MaxNLocator

    for (name, steps), (color, marker, line) in zip(branches.items(), _SERIES, strict=False):
        places = [at.step for at in steps]
        values = [value(at) if math.isfinite(at.cosine) else math.nan for at in steps]
        axes.plot(
            places, values, line, color=color, marker=marker, markersize=3.5, linewidth=1.2,
            label=name,
        )  # fmt: skip
    every = [at for steps in branches.values() for at in steps]
    broken = sorted({at.step for at in every if not math.isfinite(at.cosine)})
    if broken:
        axes.plot(
            broken, [0.97] * len(broken), "x", color=_GATE, label="not finite",
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip
    axes.set_xlim(0.5, max(at.step for at in every) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("step")


def _plain(name: str) -> str:
    """A name from a file, of bounded length, that is not taken for a formula."""
    return name[:60].replace("$", r"\$")


def _legend(axes: Axes) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.2)


def _svg(name: str, height: float, draw: Any) -> str:
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
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    _, _, svg = stream.getvalue().partition("<svg ")
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    return "<svg " + svg.replace(_INK, "currentColor")
