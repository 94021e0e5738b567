"""Plots of a benchmark."""

from __future__ import annotations

from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from wanx.benchmarks.report.svg import COLORS, legend, plain, svg
from wanx.benchmarks.speed.metrics import stage_of
from wanx.benchmarks.speed.results import Results, Trial
from wanx.benchmarks.speed.sweep import Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STAGES = ("cold start", "model load", "text", "condition", "denoise", "decode", "write")
_GB = 1e9


def stage_plot(results: Results, case: int) -> str:
    """Draw a bar for each subject: what its seconds were spent on, medians over the rounds."""
    rows = [
        (subject.label, [_stage_seconds(results.of(index, case), name) for name in STAGES])
        for index, subject in enumerate(results.subjects)
        if results.of(index, case)
    ]

    def draw(axes: Axes) -> None:
        positions = np.arange(len(rows))
        left = np.zeros(len(rows))
        for number, name in enumerate(STAGES):
            widths = np.array([seconds[number] for _, seconds in rows])
            if widths.any():
                axes.barh(positions, widths, 0.6, left, color=COLORS[number], label=name)
            left += widths
        for position, end in zip(positions, left, strict=True):
            axes.annotate(
                f"{end:.3g} s", (end, position), (4, 0), textcoords="offset points", va="center"
            )
        axes.set_yticks(positions, [plain(label, 28) for label, _ in rows])
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("seconds")
        legend(axes, columns=7)

    return svg(f"stages {case}", 0.9 + 0.4 * len(rows), draw)


def step_plot(results: Results, case: int) -> str:
    """Draw the seconds of each denoising step: the median of the rounds, and their range."""

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        most = 1
        for index, subject in enumerate(results.subjects):
            stages = [stage_of(trial, "denoise") for trial in results.of(index, case)]
            calls = np.array([stage.calls for stage in stages if stage is not None])
            if not calls.size:
                continue
            most = max(most, calls.shape[1])
            steps = np.arange(1, calls.shape[1] + 1)
            color = COLORS[index % len(COLORS)]
            axes.fill_between(
                steps, calls.min(axis=0), calls.max(axis=0), color=color, alpha=0.2, linewidth=0
            )
            middle = np.median(calls, axis=0)
            axes.plot(
                steps, middle, "o-", color=color, markersize=3, linewidth=1.2,
                label=plain(subject.label, 28),
            )  # fmt: skip
        warm_up = results.settings.warm_up
        if warm_up:
            axes.axvspan(0.5, warm_up + 0.5, color=COLORS[5], alpha=0.15, linewidth=0)
        axes.set_xlim(0.5, most + 0.5)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("step (shaded: warm-up)" if warm_up else "step")
        axes.set_ylabel("seconds")
        legend(axes, columns=3)

    return svg(f"steps {case}", 2.9, draw)


def memory_plot(results: Results, case: int) -> str | None:
    """Draw the memory over the time of the first round; None where the system does not tell."""
    trials = [results.of(index, case)[:1] for index in range(len(results.subjects))]
    shown = [(i, t[0]) for i, t in enumerate(trials) if t and t[0].memory.host_bytes]
    if not shown:
        return None

    def draw(axes: Axes) -> None:
        for index, trial in shown:
            label = plain(results.subjects[index].label, 28)
            color = COLORS[index % len(COLORS)]
            memory = trial.memory
            for values, line, where in (
                (memory.host_bytes, "-", ""),
                (memory.device_bytes, "--", ", GPU"),
            ):
                if values:
                    times = memory.interval_seconds * np.arange(1, len(values) + 1)
                    heights = np.array(values) / _GB
                    axes.plot(times, heights, line, color=color, linewidth=1.2, label=label + where)
        if len(shown) == 1:
            _name_stages(axes, shown[0][1])
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("seconds since the start of the process")
        axes.set_ylabel("GB")
        legend(axes, columns=3)

    return svg(f"memory {case}", 2.9, draw)


def sweep_plot(sweep: Sweep) -> str:
    """Draw measured steps over the number of tokens, the fit, and what it predicts."""

    def draw(axes: Axes) -> None:
        tokens = [point.tokens for point in sweep.points]
        predicted = [p for p in sweep.predictions if p.tokens <= 4 * max(tokens)]
        end = max(tokens + [p.tokens for p in predicted])
        line = np.linspace(0, end, 100)
        axes.plot(
            line, sweep.fit.linear * line + sweep.fit.quadratic * line**2, color=COLORS[0],
            linewidth=1.2, label="a·L + b·L²",
        )  # fmt: skip
        axes.plot(
            line, sweep.fit.linear * line, ":", color=COLORS[0], linewidth=1.2, label="a·L alone"
        )
        measured = [median(point.seconds) for point in sweep.points]
        axes.plot(tokens, measured, "o", color=COLORS[1], label="measured")
        if predicted:
            axes.plot(
                [p.tokens for p in predicted], [p.seconds for p in predicted], "D",
                markerfacecolor="none", color=COLORS[4], label="predicted",
            )  # fmt: skip
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("tokens L")
        axes.set_ylabel("seconds of a step")
        legend(axes)

    return svg(f"sweep {sweep.subject}", 2.9, draw)


def _stage_seconds(trials: list[Trial], name: str) -> float:
    return median(_seconds(trial, name) for trial in trials)


def _seconds(trial: Trial, name: str) -> float:
    if name == "cold start":
        return trial.cold_start_seconds
    if name == "model load":
        return sum(stage.load_seconds for stage in trial.stages)
    stage = stage_of(trial, name)
    return 0.0 if stage is None else stage.seconds


def _name_stages(axes: Axes, trial: Trial) -> None:
    """Mark where each stage begins; decoding and writing take turns and are one."""
    ends = [trial.cold_start_seconds]
    names = []
    for stage in trial.stages:
        if stage.name == "write":
            ends[-1] += stage.seconds
        else:
            names.append("decode, write" if stage.name == "decode" else stage.name)
            ends.append(ends[-1] + stage.load_seconds + stage.seconds)
    total = ends[-1]
    for name, (start, end) in zip(names, pairwise(ends), strict=True):
        axes.axvline(start, color=COLORS[5], linewidth=0.6, linestyle=":")
        if (end - start) / total > 0.09:  # room for its name
            axes.annotate(
                name, ((start + end) / 2, 0.02), xycoords=("data", "axes fraction"), ha="center",
                fontsize=8, color=COLORS[5],
            )  # fmt: skip
