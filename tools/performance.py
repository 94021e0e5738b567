"""Writes docs/performance.md from stored measurements, so that no figure in it is typed by hand.

    python tools/performance.py                            # write the page
    python tools/performance.py record NAME -- COMMAND...  # measure anew

A command prints JSON as its last line, or writes the report.json of `wanx bench` with `-o FOLDER`.
What it measured is kept in benchmarks/measurements/NAME.json with the command and the machine.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from wanx.benchmarks.report.environment import environment
from wanx.benchmarks.speed.pages.markdown import case_table
from wanx.benchmarks.speed.results import KIND, Results, read_results

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
TEMPLATE = ROOT / "docs" / "performance.md.jinja"
MEASUREMENTS = ROOT / "benchmarks" / "measurements"


def render() -> str:
    """Fill the template with every measurement, by name."""
    loader = jinja2.FileSystemLoader(TEMPLATE.parent)
    engine = jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    engine.filters |= {"n": digits}
    found = {path.stem.replace("-", "_").replace(".", "_"): read(path) for path in stored()}
    return engine.get_template(TEMPLATE.name).render(**found, table=bench_table)


def stored() -> list[Path]:
    """The files of the measurements."""
    return sorted(MEASUREMENTS.glob("*.json"))


def read(path: Path) -> Any:
    """A measurement: the results of `wanx bench`, or what a tool printed."""
    document = json.loads(path.read_text(encoding="utf-8"))
    return read_results(path) if document.get("kind") == KIND else document


def bench_table(results: Results) -> str:
    """The figures of a benchmark's first case."""
    return "\n".join(case_table(results, 0))


def digits(value: float, count: int = 3) -> str:
    """A number with ``count`` significant digits and no exponent."""
    text = f"{float(f'{value:.{count}g}'):,.12f}".rstrip("0").rstrip(".")
    whole, _, part = text.partition(".")
    missing = count - len((whole + part).replace(",", "").lstrip("0"))
    return text if missing <= 0 or value == 0 else f"{whole}.{part}{'0' * missing}"


def record(name: str, command: list[str]) -> None:
    """Run a command and keep what it measured."""
    target = MEASUREMENTS / f"{name}.json"
    if command[:2] == ["wanx", "bench"]:
        subprocess.run([sys.executable, "-m", *command], check=True)
        folder = Path(command[command.index("-o") + 1])
        target.write_text((folder / "report.json").read_text(encoding="utf-8"), encoding="utf-8")
        return
    program = [sys.executable if word == "python" else word for word in command]
    done = subprocess.run(program, check=True, stdout=subprocess.PIPE, text=True)
    document = {
        "command": shlex.join(command),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "figures": json.loads(done.stdout.strip().splitlines()[-1]),
    }
    target.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the command line, measure or write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="action")
    recording = commands.add_parser("record")
    recording.add_argument("name")
    recording.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    if arguments.action == "record":
        # The first "--" ends the options of this tool; others belong to the command.
        command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
        record(arguments.name, command)
    PAGE.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
