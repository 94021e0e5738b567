"""Measures kernels, layers, denoising steps and a generation on this machine's GPU.

    python -m benchmarks.gpu -o gpu.json

prints a table as it goes, and writes JSON after each figure. It needs no network and no weights.
Where the minutes do not suffice, what counts least is left out.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch

from benchmarks.gpu.catalog import every, selected
from benchmarks.gpu.report import Report
from benchmarks.gpu.sizes import MODELS, SIZES
from benchmarks.gpu.supervisor import new_report, supervise
from wanx.errors import CancelledError, EnvironmentMismatchError, UsageError, WanxError

MINUTES = 9.0


def run(output: Path, *, minutes: float, only: Sequence[str], quick: bool) -> Report:
    """Measure on the GPU.

    Raises:
        UsageError: a name, a number or a path cannot be.
        EnvironmentMismatchError: there is no GPU.
    """
    if not minutes > 0:
        raise UsageError(f"--minutes is {minutes:g}; give a number above 0, such as {MINUTES:g}")
    selected(every(MODELS, SIZES, quick=quick), only)
    if not torch.cuda.is_available():
        raise EnvironmentMismatchError(
            "these measurements need an NVIDIA GPU, and PyTorch finds none here; "
            "`python -m wanx.kernels.aot_compile` compiles the kernels without one"
        )
    try:
        report = new_report(output, minutes=minutes, only=only, quick=quick)
    except OSError as error:
        raise UsageError(f"cannot write {output}: {error.strerror}; choose another -o") from error
    with tempfile.TemporaryDirectory(prefix="wanx-gpu-") as folder:
        return supervise(report, Path(folder), lambda line: print(line, flush=True))


def summary(report: Report) -> str:
    """How many items ended how, and how many goals were met."""
    counts: dict[str, int] = {}
    for item in report.items:
        counts[item["status"]] = counts.get(item["status"], 0) + 1
    goals = [goal["met"] for item in report.items for goal in item["goals"]]
    ended = ", ".join(f"{count} {status}" for status, count in counts.items())
    whole = "" if report.data["complete"] else "; incomplete"
    return f"{ended}; {sum(goals)} of {len(goals)} goals met{whole}; {report.path}"


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    """Parse, measure, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu.json"), help="gpu.json")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"{MINUTES:g} unless given")
    parser.add_argument("--only", nargs="+", default=[], help="items whose names begin like this")
    parser.add_argument("--quick", action="store_true", help="480P and fewer rounds")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop)
    try:
        report = run(asked.output, minutes=asked.minutes, only=asked.only, quick=asked.quick)
    except WanxError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(f"stopped; {asked.output} holds what was measured", file=sys.stderr)
        sys.exit(CancelledError.exit_code)
    print(summary(report))
    sys.exit(0 if any(item["status"] == "measured" for item in report.items) else 1)


if __name__ == "__main__":
    main()
