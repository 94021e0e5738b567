"""What the figures of the built-in model may be: a stored value each, and how bad it may become.

A margin covers what another processor does to the same code. Measured were the same weights with
one and two threads, with the portable graphs in the place of the faster ones, with ONNX Runtime's
optimisations off, and with PyTorch, oneDNN and MKL held to SSE while calibrating:

    golden cosine           1 % of its distance from 1
    golden SQNR             0.05 dB, and 3.4 dB at fp32, where it is rounding alone
    teacher-forced cosine   5 % of its distance from 1
    cosine of text          6e-6
    worst frame of clips    3 dB of PSNR, 75 % of the distance of SSIM from 1
    layers, size            nothing, but layers of int8 are within 0.1 dB of the gate

One layer of int8 more or less moved the golden SQNR by 0.03 dB, the teacher-forced cosine by 7 %
of its distance, and the worst frame by 9 dB: videos that run freely diverge, so clips are reported
and not judged. With 12 and with 20 steps, rounding changed up to two shapes of 41, no more.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

STORED = Path(__file__).parents[2] / "tests" / "accuracy" / "envelopes.json"

Verdict = Literal["ok", "WORSE", "better", "reported", "NOT STORED", "NOT MEASURED"]
Envelopes = dict[str, dict[str, "Envelope"]]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Which way a figure is better, and by how much it may be worse than stored.

    The margin is ``absolute``, and ``share`` of the stored value's distance from 1.
    """

    absolute: float
    share: float = 0.0
    higher: bool = True

    def margin(self, value: float) -> float:
        """How far a figure may move from ``value``."""
        return self.absolute + self.share * abs(1 - value)

    def bound(self, value: float) -> float:
        """The worst that passes where ``value`` is stored."""
        margin = self.margin(value)
        return value - margin if self.higher else value + margin


KINDS: dict[str, Kind | None] = {
    "golden cosine": Kind(absolute=1e-6, share=0.1),
    "golden SQNR": Kind(absolute=0.5),
    "cosine conditional": Kind(absolute=1e-6, share=0.2),
    "cosine unconditional": Kind(absolute=1e-6, share=0.2),
    "cosine text": Kind(absolute=2e-5),
    "clip PSNR": None,
    "clip SSIM": None,
    "8-bit layers": Kind(absolute=2),
    "layers kept high": Kind(absolute=2, higher=False),
    "object seen": Kind(absolute=2.5),
    "colour seen": Kind(absolute=2.5),
    "background seen": Kind(absolute=2.5),
    "direction seen": Kind(absolute=2.5),
    "shape seen": Kind(absolute=5.0),
    "megabytes": Kind(absolute=0.2, higher=False),
}
# The error of fp32 is nothing but rounding, which differs a lot where it is that small.
KINDS_AT = {("fp32", "golden SQNR"): Kind(absolute=10.0)}


def kind_of(precision: str, name: str) -> Kind | None:
    """How a figure of a precision is judged; None if it is only reported."""
    return KINDS_AT.get((precision, name), KINDS[name])


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """A figure as it was, and the worst that it may become: None, anything."""

    value: float
    bound: float | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """A figure now beside its envelope; ``stored`` or ``now`` is None where there is none."""

    precision: str
    name: str
    stored: Envelope | None
    now: float | None

    @property
    def verdict(self) -> Verdict:
        """What the two say; NaN is worse than anything."""
        if self.stored is None:
            return "NOT STORED"
        if self.now is None:
            return "NOT MEASURED"
        kind = kind_of(self.precision, self.name)
        value, bound, now = self.stored.value, self.stored.bound, self.now
        if kind is None or bound is None:
            return "reported"
        if not (now >= bound if kind.higher else now <= bound):
            return "WORSE"
        gain = now - value if kind.higher else value - now
        return "better" if gain > kind.margin(value) else "ok"

    @property
    def passed(self) -> bool:
        """Whether the figure is in its envelope, or better."""
        return self.verdict in ("ok", "better", "reported")


def judge(stored: Envelopes, measured: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """Put every figure beside its envelope, by precision and name."""
    return [
        Row(
            precision=precision,
            name=name,
            stored=stored.get(precision, {}).get(name),
            now=measured.get(precision, {}).get(name),
        )
        for precision in {**stored, **measured}
        for name in {**stored.get(precision, {}), **measured.get(precision, {})}
    ]


def table(rows: Iterable[Row]) -> str:
    """Print figures, envelopes and verdicts, a line each."""
    lines = [("", "figure", "stored", "bound", "now", "")]
    for row in rows:
        value, bound = (row.stored.value, row.stored.bound) if row.stored else (None, None)
        cells = (_number(x) for x in (value, bound, row.now))
        lines.append((row.precision, row.name, *cells, row.verdict))
    return "\n".join(
        f"{precision:<5}{name:<21}{stored:>11}{bound:>11}{now:>11}  {verdict}".rstrip()
        for precision, name, stored, bound, now, verdict in lines
    )


def enclose(measured: Mapping[str, Mapping[str, float]]) -> Envelopes:
    """Make envelopes around figures."""
    found: Envelopes = {}
    for precision, figures in measured.items():
        found[precision] = {}
        for name, figure in figures.items():
            value = round(figure, 6)
            kind = kind_of(precision, name)
            bound = None if kind is None else round(kind.bound(value), 6)
            found[precision][name] = Envelope(value=value, bound=bound)
    return found


def read_envelopes(path: Path) -> Envelopes:
    """Read what :func:`write_envelopes` wrote; nothing where there is no file."""
    if not path.exists():
        return {}
    return {
        precision: {name: Envelope(**facts) for name, facts in figures.items()}
        for precision, figures in json.loads(path.read_text()).items()
    }


def write_envelopes(envelopes: Envelopes, path: Path) -> None:
    """Write envelopes as JSON, a figure a line.

    Raises:
        ValueError: a figure is not finite.
    """
    blocks = []
    for precision, figures in envelopes.items():
        lines = (
            f"  {json.dumps(name)}: {json.dumps(vars(envelope), allow_nan=False)}"
            for name, envelope in figures.items()
        )
        blocks.append(f" {json.dumps(precision)}: {{\n" + ",\n".join(lines) + "\n }")
    path.write_text("{\n" + ",\n".join(blocks) + "\n}\n")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}".rstrip("0").rstrip(".")
