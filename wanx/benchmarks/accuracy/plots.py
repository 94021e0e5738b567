"""Plots of a comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from wanx.accuracy.gates import Agreement
from wanx.benchmarks.accuracy.comparison import RunComparison
from wanx.benchmarks.report.svg import BAD, COLORS, legend, plain, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_LAYERS = 40

_EXACT = 1e-9  # stands for 0 on a logarithmic axis
_MARKERS = (("o", "-"), ("s", "--"))


def cosine_plot(run: RunComparison, gate: float) -> str:
    """Draw 1 - cosine of the velocity over the steps, on a logarithmic axis, with its gate."""

    def draw(axes: Axes) -> None:
        _lines(axes, run.branches, lambda at: max(1 - at.cosine, _EXACT))
        axes.set_yscale("log")
        axes.axhline(1 - gate, color=BAD, linewidth=1, label=f"gate {gate:g}")
        axes.set_ylabel("1 − cosine")
        axes.margins(y=0.15)
        legend(axes)

    return svg("cosine", 2.9, draw)


def sqnr_plot(run: RunComparison) -> str:
    """Draw the signal-to-noise ratio of the velocity over the steps."""

    def draw(axes: Axes) -> None:
        _lines(axes, run.branches, lambda at: at.sqnr_db)
        axes.set_ylabel("SQNR (dB)")
        axes.margins(y=0.15)
        legend(axes)

    return svg("sqnr", 2.9, draw)


def layer_plot(layers: Mapping[str, float], gate_db: float | None) -> str:
    """Draw the worst layers as bars, the worst at the top, with their gate."""
    chosen = sorted(layers.items(), key=lambda item: item[1])[:MOST_LAYERS]

    def draw(axes: Axes) -> None:
        names, values = zip(*chosen, strict=True)
        low = [gate_db is not None and not value >= gate_db for value in values]
        positions = range(len(names))
        axes.barh(positions, values, color=[BAD if bad else COLORS[0] for bad in low], height=0.7)
        axes.set_yticks(positions, [plain(name) for name in names])
        axes.invert_yaxis()
        axes.margins(y=0.01)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("SQNR of the layer's output (dB)")
        if gate_db is not None:
            axes.axvline(gate_db, color=BAD, linewidth=1, label=f"gate {gate_db:g} dB")
            legend(axes)

    return svg("layers", 0.9 + 0.19 * len(chosen), draw)


def _lines(axes: Axes, branches: Mapping[Any, Sequence[Agreement]], value: Any) -> None:
    """A line for each branch, with a gap and a cross where the velocity is not finite."""
    from matplotlib.ticker import MaxNLocator

    styles = zip(COLORS, _MARKERS, strict=False)
    for (name, steps), (color, (marker, line)) in zip(branches.items(), styles, strict=False):
        positions = [at.step for at in steps]
        values = [value(at) if math.isfinite(at.cosine) else math.nan for at in steps]
        axes.plot(
            positions, values, line, color=color, marker=marker, markersize=3.5, linewidth=1.2,
            label=name,
        )  # fmt: skip
    every = [at for steps in branches.values() for at in steps]
    broken = sorted({at.step for at in every if not math.isfinite(at.cosine)})
    if broken:
        axes.plot(
            broken, [0.97] * len(broken), "x", color=BAD, label="not finite",
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip
    axes.set_xlim(0.5, max(at.step for at in every) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("step")
