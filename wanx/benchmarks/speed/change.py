"""Changes between two reports, and the noise that they are held against.

A figure is the median over the rounds of a report. Noise is estimated from the rounds themselves:
with s the standard deviation of their logarithms within the two reports, of n and m rounds, the
ratio of two medians of the same thing stays within exp(±t·s·√(1/n + 1/m)), t being the quantile of
Student's distribution for 95 % and n + m - 2 degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

from wanx.benchmarks.speed.metrics import METRICS, by_round
from wanx.benchmarks.speed.results import Results, pluralize
from wanx.errors import UsageError

# Student's distribution, two-sided 95 %, for 1, 2, … degrees of freedom; the last for all beyond.
_QUANTILES = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


@dataclass(frozen=True, kw_only=True)
class Change:
    """One figure in two reports.

    Attributes:
        subject: label in the new report.
        case: label.
        metric: name.
        old: median, seconds.
        new: median, seconds.
        noise: the ratio that noise alone may make, minus 1; None where both reports have
            a single round, which says nothing about noise.
    """

    subject: str
    case: str
    metric: str
    old: float
    new: float
    noise: float | None

    @property
    def growth(self) -> float:
        """Slowdown of the new one: 0.1 is 10 %."""
        return self.new / self.old - 1

    @property
    def beyond_noise(self) -> bool | None:
        """True where there is a change at all; None if noise is unknown."""
        if self.noise is None:
            return None
        return abs(math.log(self.new / self.old)) > math.log1p(self.noise)

    def slower_than(self, share: float) -> bool:
        """Check for a slowdown of more than ``share`` that noise does not explain."""
        return self.growth > share and self.beyond_noise is not False

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self) | {"growth": self.growth, "beyond_noise": self.beyond_noise}


def changes(old: Results, new: Results) -> list[Change]:
    """Every figure that both reports have.

    Subjects are matched by label, or by position where both reports have one.

    Raises:
        UsageError: the reports have nothing in common.
    """
    figures = []
    for before, after in _pairs([s.label for s in old.subjects], [s.label for s in new.subjects]):
        for new_case, case in enumerate(new.cases):
            if case not in old.cases:
                continue
            old_case = old.cases.index(case)
            for metric in METRICS:
                olds = list(by_round(old, metric, before, old_case).values())
                news = list(by_round(new, metric, after, new_case).values())
                if olds and news and min(*olds, *news) > 0:
                    figures.append(
                        Change(
                            subject=new.subjects[after].label,
                            case=case.label,
                            metric=metric.name,
                            old=median(olds),
                            new=median(news),
                            noise=_noise(olds, news),
                        )
                    )
    if not figures:
        raise UsageError(
            f"the reports have no figure in common: one measured {_what(old)}, the other "
            f"{_what(new)}; measure the same bundle, size, frames and steps"
        )
    return figures


def differences(old: Results, new: Results) -> list[str]:
    """Differences of machine, versions and settings, which make reports hard to compare."""
    names = sorted({*old.environment, *new.environment})
    pairs = [(n, old.environment.get(n, "–"), new.environment.get(n, "–")) for n in names]
    pairs += [
        (name, str(getattr(old.settings, name)), str(getattr(new.settings, name)))
        for name in ("warm_up", "threads", "provider")
    ]
    return [f"{name}: {before} → {after}" for name, before, after in pairs if before != after]


def _pairs(old: Sequence[str], new: Sequence[str]) -> list[tuple[int, int]]:
    if len(old) == len(new) == 1:
        return [(0, 0)]
    return [(old.index(label), position) for position, label in enumerate(new) if label in old]


def _noise(olds: Sequence[float], news: Sequence[float]) -> float | None:
    freedom = len(olds) + len(news) - 2
    if freedom == 0:
        return None
    squares = 0.0
    for values in (olds, news):
        logs = [math.log(value) for value in values]
        middle = fmean(logs)
        squares += sum((value - middle) ** 2 for value in logs)
    deviation = math.sqrt(squares / freedom * (1 / len(olds) + 1 / len(news)))
    return math.expm1(_QUANTILES[min(freedom, len(_QUANTILES)) - 1] * deviation)


def _what(results: Results) -> str:
    subjects = ", ".join(subject.label for subject in results.subjects)
    cases = ", ".join(f"{case.label}, {pluralize(case.steps, 'step')}" for case in results.cases)
    return f"{subjects} at {cases}"
