"""Tables of a benchmark, on stdout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from wanx.commands.display.generation import STDOUT

if TYPE_CHECKING:
    from wanx.benchmarks.speed.change import Change
    from wanx.benchmarks.speed.results import Results


def print_results(results: Results, folder: Path) -> None:
    """Summarise a benchmark: medians, and how many times faster than the baseline."""
    from wanx.benchmarks.speed.metrics import amount, metric_rows
    from wanx.benchmarks.speed.results import pluralize

    for number, case in enumerate(results.cases):
        STDOUT.print(
            f"{case.label}, {pluralize(case.tokens, 'token')}, {pluralize(case.steps, 'step')}"
        )
        table = Table("", box=None, pad_edge=False)
        for subject in results.subjects:
            table.add_column(subject.label, justify="right")
        for metric, figures in metric_rows(results, number):
            cells = []
            for index, (seconds, ratio) in enumerate(figures):
                text = amount(seconds.median) if seconds else "–"
                if ratio and index != results.settings.baseline:
                    text += f"  {ratio.median:.2f}×"
                cells.append(text)
            table.add_row(metric.name, *cells)
        STDOUT.print(table)
    for item in results.rooflines:
        STDOUT.print(f"{results.subjects[item.subject].label}, {item.component}: {item.sentence}")
    for note in results.notes:
        STDOUT.print(note)
    STDOUT.print(f"wrote {folder / 'report.html'}, report.json and report.md")


def print_changes(changes: Sequence[Change], differences: Sequence[str]) -> None:
    """List every figure of two reports, with what is more than noise."""
    from wanx.benchmarks.speed.metrics import amount

    for line in differences:
        STDOUT.print(f"not the same: {line}")
    table = Table("", "old", "new", "change", "noise", "", box=None, pad_edge=False)
    for column in table.columns[1:5]:
        column.justify = "right"
    shown = None
    for change in changes:
        if (change.subject, change.case) != shown:
            shown = (change.subject, change.case)
            table.add_row(f"{change.subject}, {change.case}")
        noise = "unknown" if change.noise is None else f"±{change.noise:.1%}"
        table.add_row(
            f"  {change.metric}", amount(change.old), amount(change.new),
            f"{change.growth:+.1%}", noise, _verdict(change),
        )  # fmt: skip
    STDOUT.print(table)


def _verdict(change: Change) -> Text:
    if not change.beyond_noise:
        return Text("")
    return Text("slower", "red") if change.growth > 0 else Text("faster", "green")
