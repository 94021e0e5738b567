"""A benchmark as Markdown, for pasting."""

from __future__ import annotations

from wanx.benchmarks.speed.metrics import amount, metric_rows, peak_rows
from wanx.benchmarks.speed.results import Results, pluralize


def to_markdown(results: Results) -> str:
    """Write tables of all figures, with what they were measured on and the command."""
    lines = []
    for problem in results.problems:
        lines.append(f"**Incomplete:** {problem}\n")
    for index, case in enumerate(results.cases):
        guidance = "without guidance" if case.guide_scale == 1 else "with guidance"
        amounts = f"{pluralize(case.tokens, 'token')}, {pluralize(case.steps, 'step')}"
        lines += [f"**{case.label}**, {amounts}, {guidance}", ""]
        lines += [*case_table(results, index), ""]
    lines += [f"{note}\n" for note in results.notes]
    lines += [
        f"Medians of {pluralize(results.settings.repeat, 'round')} in processes of their own, "
        "taking turns; "
        f"`step` leaves out the first {results.settings.warm_up} of each. "
        + "; ".join(f"{name} {value}" for name, value in results.environment.items())
        + f"; wanx {results.wanx_version}.",
        "",
        f"    {results.command}",
        "",
    ]
    return "\n".join(lines)


def case_table(results: Results, case: int) -> list[str]:
    """The rows of a table of one case."""
    subjects = range(len(results.subjects))
    baseline = results.settings.baseline
    several = len(results.subjects) > 1
    head = [""]
    for index in subjects:
        head.append(results.subjects[index].label)
        if index != baseline and several:
            head.append(f"times {results.subjects[baseline].label}")
    rows = [head, ["---"] * len(head)]
    for metric, figures in metric_rows(results, case):
        cells = []
        for index, (seconds, ratio) in enumerate(figures):
            text = amount(seconds.median) if seconds else "–"
            if seconds and seconds.count > 1:
                text += f" ({amount(seconds.p10)} to {amount(seconds.p90)})"
            cells.append(text)
            if index != baseline and several:
                cells.append(f"{ratio.median:.2f}" if ratio else "–")
        rows.append([metric.name, *cells])
    for name, peaks in peak_rows(results, case):
        cells = []
        for index, peak in enumerate(peaks):
            cells.append("–" if peak is None else f"{peak / 1e9:.2f} GB")
            if index != baseline and several:
                cells.append("")
        rows.append([f"peak memory, {name}", *cells])
    sizes = []
    for index in subjects:
        sizes.append(f"{results.subjects[index].size_bytes / 1e6:,.1f} MB")
        if index != baseline and several:
            sizes.append("")
    rows.append(["bundle", *sizes])
    return [f"| {' | '.join(_escape(cell) for cell in row)} |" for row in rows]


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
