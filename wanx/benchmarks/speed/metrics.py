"""Metrics of trials: every figure with the words that say exactly what was timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from wanx.benchmarks.speed.results import Case, Results, Trial
from wanx.runtime.stages import Stage


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A figure of one trial, in seconds; lower is better.

    Attributes:
        name: as reports have it.
        definition: what is timed, in one sentence.
        value: of a trial and the number of its first steps that do not count; None where the
            trial has no such thing.
    """

    name: str
    definition: str
    value: Callable[[Trial, Case, int], float | None]


def stage_of(trial: Trial, name: str) -> Stage | None:
    """A stage of a trial by its name."""
    return next((stage for stage in trial.stages if stage.name == name), None)


def steady_steps(trial: Trial, warm_up: int) -> tuple[float, ...]:
    """Seconds of the denoising steps after the first ``warm_up``."""
    stage = stage_of(trial, "denoise")
    return () if stage is None else stage.calls[warm_up:]


def _seconds(name: str) -> Callable[[Trial, Case, int], float | None]:
    def value(trial: Trial, case: Case, warm_up: int) -> float | None:
        stage = stage_of(trial, name)
        return None if stage is None else stage.seconds

    return value


def _step(trial: Trial, case: Case, warm_up: int) -> float | None:
    steps = steady_steps(trial, warm_up)
    return median(steps) if steps else None


def _first_step(trial: Trial, case: Case, warm_up: int) -> float | None:
    stage = stage_of(trial, "denoise")
    return stage.calls[0] if stage is not None and stage.calls else None


def _decode(trial: Trial, case: Case, warm_up: int) -> float | None:
    stage = stage_of(trial, "decode")
    return None if stage is None else stage.seconds / case.frames


METRICS = (
    Metric(
        name="end to end",
        definition="From starting the process to the finished file: everything below, one after "
        "the other.",
        value=lambda trial, case, warm_up: trial.end_to_end_seconds,
    ),
    Metric(
        name="cold start",
        definition="From starting the process to a pipeline: Python, imports, opening the bundle "
        "and checking its files.",
        value=lambda trial, case, warm_up: trial.cold_start_seconds,
    ),
    Metric(
        name="model load",
        definition="Loading the networks, each before its stage and freed after it; the files may "
        "be in the page cache.",
        value=lambda trial, case, warm_up: sum(stage.load_seconds for stage in trial.stages),
    ),
    Metric(
        name="text encode",
        definition="Tokenising and encoding the prompt and, with guidance, the negative prompt, "
        "on a network that has just been loaded.",
        value=_seconds("text"),
    ),
    Metric(
        name="condition",
        definition="Encoding images and videos (image-to-video, first-last-frame and VACE only).",
        value=_seconds("condition"),
    ),
    Metric(
        name="first step",
        definition="The first denoising step, which allocates memory and warms up.",
        value=_first_step,
    ),
    Metric(
        name="step",
        definition="One denoising step after the warm-up: one forward without and two with "
        "guidance, guidance and the solver; the median of a trial.",
        value=_step,
    ),
    Metric(
        name="decode, a frame",
        definition="VAE decoding and conversion to 8-bit pixels, over the number of frames.",
        value=_decode,
    ),
    Metric(
        name="video write",
        definition="Opening the file, encoding the frames and syncing it to the disk.",
        value=_seconds("write"),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A figure over the rounds, or over the steps of all rounds.

    Attributes:
        median: seconds.
        p10: the 10th percentile, seconds.
        p90: the 90th percentile, seconds.
        count: how many values there are.
    """

    median: float
    p10: float
    p90: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value; percentiles interpolate linearly."""
        p10, mid, p90 = (float(v) for v in np.percentile(values, (10, 50, 90)))
        return cls(median=mid, p10=p10, p90=p90, count=len(values))


def by_round(results: Results, metric: Metric, subject: int, case: int) -> dict[int, float]:
    """A metric of every round that has it."""
    warm_up = results.settings.warm_up
    values = {
        trial.round: metric.value(trial, results.cases[case], warm_up)
        for trial in results.of(subject, case)
    }
    return {number: value for number, value in values.items() if value is not None}


def spread(results: Results, metric: Metric, subject: int, case: int) -> Spread | None:
    """A metric over the rounds; of ``step``, over the steps of all rounds."""
    if metric.name == "step":
        trials = results.of(subject, case)
        values = [s for trial in trials for s in steady_steps(trial, results.settings.warm_up)]
    else:
        values = list(by_round(results, metric, subject, case).values())
    return Spread.of(values) if values else None


def speedup(results: Results, metric: Metric, subject: int, case: int) -> Spread | None:
    """Speedup over the baseline, pair by pair: one ratio for each round."""
    theirs = by_round(results, metric, results.settings.baseline, case)
    ours = by_round(results, metric, subject, case)
    ratios = [theirs[n] / ours[n] for n in ours if n in theirs and ours[n] > 0 and theirs[n] > 0]
    return Spread.of(ratios) if ratios else None


def metric_rows(
    results: Results, case: int
) -> Iterator[tuple[Metric, list[tuple[Spread | None, Spread | None]]]]:
    """The metrics that any subject has, each with its spread and speedup by subject."""
    subjects = range(len(results.subjects))
    for metric in METRICS:
        spreads = [spread(results, metric, index, case) for index in subjects]
        if any(spreads):
            ratios = [speedup(results, metric, index, case) for index in subjects]
            yield metric, list(zip(spreads, ratios, strict=True))


def peak_rows(results: Results, case: int) -> Iterator[tuple[str, list[int | None]]]:
    """The stages whose peak memory is known of any subject, each with the bytes by subject."""
    peaks = [peak_bytes(results, index, case) for index in range(len(results.subjects))]
    for name in dict.fromkeys(name for stages in peaks for name in stages):
        yield name, [stages.get(name) for stages in peaks]


def peak_bytes(results: Results, subject: int, case: int) -> dict[str, int]:
    """The most memory that each stage took in any round: ``host`` by stage, and ``device``."""
    peaks: dict[str, int] = {}
    for trial in results.of(subject, case):
        for stage in trial.stages:
            if stage.peak_bytes is not None and stage.name != "write":
                peaks[stage.name] = max(peaks.get(stage.name, 0), stage.peak_bytes)
        if trial.memory.device_bytes:
            peaks["GPU"] = max(peaks.get("GPU", 0), *trial.memory.device_bytes)
    return peaks


def amount(seconds: float | None) -> str:
    """Seconds with three digits and a fitting unit."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1 or unit == "µs":
            return f"{_three_digits(seconds * factor)} {unit}"
    raise AssertionError


def _three_digits(value: float) -> str:
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
