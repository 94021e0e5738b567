"""The plot of a roofline: speed of each part over the operations that it has for each byte."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from wanx.benchmarks.report.svg import COLORS, legend, plain, svg
from wanx.benchmarks.speed.roofline.bounds import Roofline

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def roofline_plot(roofline: Roofline, number: int) -> str:
    """Draw the ceilings and the parts; ``number`` tells the plots of one page apart.

    Parts without operations, which only move bytes, have no place in it; where the target gives no
    times of parts, the ceilings of the parts are drawn.
    """
    shown = [part for part in roofline.parts if sum(part.flops.values()) and part.bytes]

    def draw(axes: Axes) -> None:
        ceilings = roofline.ceilings
        intensities = [sum(part.flops.values()) / part.bytes for part in shown]
        low, high = min(intensities, default=1) / 3, max(intensities, default=1) * 3
        line = np.geomspace(low, high, 200)
        used = {kind for part in shown for kind in part.flops if kind in ceilings.flops} or {"high"}
        for index, kind in enumerate(sorted(used)):
            rate = ceilings.flops[kind]
            name = ceilings.high if kind == "high" else kind
            axes.plot(
                line, np.minimum(line * ceilings.bytes, rate) / 1e9, ("-", "--", ":")[index % 3],
                color=COLORS[5], linewidth=1.2, label=f"ceiling, {name}",
            )  # fmt: skip
        for index, (part, intensity) in enumerate(zip(shown, intensities, strict=True)):
            seconds = part.seconds or part.least_seconds
            axes.plot(
                intensity, sum(part.flops.values()) / seconds / 1e9, "o", markersize=6,
                color=COLORS[index % 5], label=plain(part.name),
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("operations for each byte that has to move")
        axes.set_ylabel("GFLOP/s")
        legend(axes, columns=3)

    return svg(f"roofline {number}", 3.4, draw)
