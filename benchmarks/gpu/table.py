"""Table at the end of a run: what each item gave, goals, and what failed."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.report import Report

_WIDTH = 120


def final_table(report: Report) -> list[str]:
    """The lines of the table; short, as it may be all that is seen of a run."""
    lines = [f"{'item':32} {'status':9} {'seconds':>8} {'figures':>8} {'goals':>6}  remarks"]
    for item in report.items:
        figures = sum("error" not in row for row in item["rows"])
        goals = item["goals"]
        met = f"{sum(goal['met'] for goal in goals)}/{len(goals)}" if goals else ""
        seconds = f"{item['seconds']:.1f}" if "seconds" in item else ""
        start = f"{item['name']:32} {item['status']:9} {seconds:>8} {figures:>8} {met:>6}"
        lines.append(f"{start}  {_remarks(item)}".rstrip())
    for item in report.items:
        lines += [
            f"missed in {item['name']}: {goal['goal']}: {_value(goal)}"
            for goal in item["goals"]
            if not goal["met"]
        ]
    lines += [f"crash at {subject}: {reason}" for subject, reason in report.data["crashes"].items()]
    return lines


def summary(report: Report) -> str:
    """Counts of items by status and of goals that were met, and the file."""
    counts: dict[str, int] = {}
    for item in report.items:
        counts[item["status"]] = counts.get(item["status"], 0) + 1
    goals = [goal["met"] for item in report.items for goal in item["goals"]]
    ended = ", ".join(f"{count} {status}" for status, count in counts.items())
    whole = "" if report.data["complete"] else "; incomplete"
    return f"{ended}; {sum(goals)} of {len(goals)} goals met{whole}; {report.path}"


def _remarks(item: dict[str, Any]) -> str:
    errors = [
        f"{row['what']}, {row['by']}: {row['error']}" for row in item["rows"] if "error" in row
    ]
    first = item.get("reason") or (errors[0] if errors else "")
    more = len(errors) - 1 + ("reason" in item)
    return f"{first:.{_WIDTH}}" + (f" (and {more} more)" if errors and more > 0 else "")


def _value(goal: dict[str, Any]) -> str:
    value = goal["value"]
    return "not measured" if value is None else f"{float(value):.4g}"
