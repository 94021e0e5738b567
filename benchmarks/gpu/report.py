"""Report of a GPU run: JSON that is whole at any time, and lines of a table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from wanx.benchmarks.report.files import dumps, json_safe, write_files

SCHEMA_VERSION = 1
HEAD = f"{'what':44} {'by':24} {'ms':>10} {'rate':>15} {'of ceiling':>10}  against, numerics"


@dataclass(frozen=True, kw_only=True)
class Times:
    """Durations of a call.

    Attributes:
        seconds: of one call, round by round.
        calls: in a round, one after the other.
        note: how it was run, where that is not as asked.
    """

    seconds: tuple[float, ...]
    calls: int = 1
    note: str | None = None

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One figure with its circumstances.

    Attributes:
        operation: the kernel, layer or step.
        implementation: library or variant that ran it.
        shape: sizes by name.
        times: how long it took.
        rate: operations or bytes per second.
        unit: of ``rate``, ``FLOP/s`` or ``B/s``.
        peak: name of the ceiling that it is compared with.
        ceiling: that ceiling, in the unit of ``rate``.
        speedup: how many times faster it is than others, by their names.
        numerics: how far its result is from the right one.
        details: more, under names of their own.
        error: why there are no times.
    """

    operation: str
    implementation: str
    shape: dict[str, int] = field(default_factory=dict)
    times: Times | None = None
    rate: float | None = None
    unit: str = "FLOP/s"
    peak: str | None = None
    ceiling: float | None = None
    speedup: dict[str, float] = field(default_factory=dict)
    numerics: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def of_ceiling(self) -> float | None:
        """Share of the ceiling that it reaches."""
        return self.rate / self.ceiling if self.rate and self.ceiling else None

    def record(self) -> dict[str, Any]:
        """For the JSON."""
        times: dict[str, Any] = {}
        if self.times is not None:
            times = {
                "ms": 1e3 * self.times.median,
                "rounds_ms": [1e3 * seconds for seconds in self.times.seconds],
                "calls_per_round": self.times.calls,
                "note": self.times.note,
            }
        rate = {} if self.rate is None else {"rate": self.rate, "unit": self.unit}
        share = self.of_ceiling
        ceiling = {} if share is None else {"ceiling": self.peak, "of_ceiling": share}
        rest = {
            "speedup": self.speedup,
            "numerics": self.numerics,
            **self.details,
            "error": self.error,
        }
        fields = {**times, **rate, **ceiling, **rest}
        kept = {name: value for name, value in fields.items() if value not in (None, {})}
        start = {"what": self.operation, "by": self.implementation, "shape": self.shape}
        record: dict[str, Any] = json_safe({**start, **kept}, str)
        return record

    def line(self) -> str:
        """For the table."""
        start = f"{self._title():44} {self.implementation:24}"
        if self.error is not None:
            return f"{start} {self.error}"
        rate = ""
        if self.rate is not None:
            scale, unit = (1e12, "TFLOP/s") if self.unit == "FLOP/s" else (1e9, "GB/s")
            rate = f"{self.rate / scale:.0f} {unit}"
        share = "" if self.of_ceiling is None else f"{self.of_ceiling:.2f}"
        against = [f"{times:.2f}x {other}" for other, times in self.speedup.items()]
        numerics = [f"{name} {value:.5g}" for name, value in self.numerics.items()]
        rest = "  ".join([*against, *numerics])
        ms = "" if self.times is None else f"{1e3 * self.times.median:.3f}"
        return f"{start} {ms:>10} {rate:>15} {share:>10}  {rest}".rstrip()

    def _title(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.shape.items())
        return f"{self.operation}, {sizes}" if sizes else self.operation


@dataclass(frozen=True, kw_only=True)
class Goal:
    """Something to be reached.

    Attributes:
        goal: in words.
        value: what was measured; None where it could not be.
        met: whether that reaches it.
    """

    goal: str
    value: float | None
    met: bool

    @staticmethod
    def at_least(goal: str, value: float | None, least: float) -> Goal:
        """A goal that larger values meet."""
        return Goal(goal=goal, value=value, met=value is not None and value >= least)

    @staticmethod
    def at_most(goal: str, value: float | None, most: float) -> Goal:
        """A goal that smaller values meet."""
        return Goal(goal=goal, value=value, met=value is not None and value <= most)

    def record(self) -> dict[str, Any]:
        """For the JSON."""
        record: dict[str, Any] = json_safe(asdict(self), str)
        return record

    def line(self) -> str:
        """For the table."""
        value = "not measured" if self.value is None else f"{self.value:.4g}"
        return f"  goal {'met' if self.met else 'MISSED'}: {self.goal}: {value}"


ReportItem = Measurement | Goal


class Report:
    """The JSON file. Each change is written at once, so that an interruption loses nothing."""

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path = path
        self.data = {"schema_version": SCHEMA_VERSION, "complete": False, **data}
        self.data.setdefault("items", [])
        self.data.setdefault("crashes", {})

    @classmethod
    def read(cls, path: Path) -> Report:
        """The report that a process before this one began."""
        return cls(path, json.loads(path.read_text(encoding="utf-8")))

    @property
    def items(self) -> list[dict[str, Any]]:
        """Records of what was run or skipped so far."""
        items: list[dict[str, Any]] = self.data["items"]
        return items

    def save(self) -> None:
        """Write the file, whole or not at all.

        Raises:
            WanxError: it cannot be written.
        """
        write_files({self.path: dumps(self.data)})

    def begin(self, name: str, status: str = "running", reason: str | None = None) -> None:
        """Add an item."""
        record = {"name": name, "status": status, "rows": [], "goals": []}
        if reason is not None:
            record["reason"] = reason
        self.items.append(record)
        self.save()

    def add(self, figure: ReportItem) -> None:
        """Add to the item that was begun last."""
        self.items[-1]["rows" if isinstance(figure, Measurement) else "goals"].append(
            figure.record()
        )
        self.save()

    def end(self, status: str, seconds: float, reason: str | None = None) -> None:
        """Close the item that was begun last."""
        self.items[-1] |= {"status": status, "seconds": round(seconds, 3)}
        if reason is not None:
            self.items[-1]["reason"] = reason
        self.save()

    def finish(self) -> None:
        """Nothing is missing any more."""
        self.data["complete"] = True
        self.save()


Print = Callable[[str], None]
