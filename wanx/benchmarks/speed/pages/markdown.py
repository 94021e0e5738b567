"""A benchmark as Markdown, for pasting."""

from __future__ import annotations

from wanx.benchmarks.speed.metrics import METRICS, amount, peak_bytes, speedup, spread
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
    for metric in METRICS:
        cells = []
        for index in subjects:
            found = spread(results, metric, index, case)
            text = amount(found.median) if found else "–"
            if found and found.count > 1:
                text += f" ({amount(found.p10)} to {amount(found.p90)})"
            cells.append(text)
            if index != baseline and several:
                ratio = speedup(results, metric, index, case)
                cells.append(f"{ratio.median:.2f}" if ratio else "–")
        if any(cell != "–" for cell in cells):
            rows.append([metric.name, *cells])
    peaks = [peak_bytes(results, index, case) for index in subjects]
    for name in dict.fromkeys(name for found in peaks for name in found):
        cells = []
        for index in subjects:
            cells.append(f"{peaks[index][name] / 1e9:.2f} GB" if name in peaks[index] else "–")
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
