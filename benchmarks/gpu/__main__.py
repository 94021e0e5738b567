"""Measures everything that matters on this machine's GPU, the most valuable first.

    python -m benchmarks.gpu --minutes 8 -o gpu.json

checks every kernel against its reference, compiles the built-in model and generates a video with
it, and measures ceilings, attention, linears, denoising steps and tuned kernels, as far as the
minutes go: it ends before they are over, whatever crashes or hangs. It prints a line for each
figure, writes JSON after each, and prints a table at the end. It needs no network and no weights;
with ``--only tests`` it runs the project's own tests for GPUs, and ``--rehearse`` runs it on a
processor, at sizes that say nothing.
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

from benchmarks.gpu import STARTED
from benchmarks.gpu.catalog import all_items, needed_programs, selected
from benchmarks.gpu.programs import TINY, job
from benchmarks.gpu.report import Report
from benchmarks.gpu.sizes import MODELS, REHEARSAL_MODEL, REHEARSAL_SIZE, SIZES
from benchmarks.gpu.supervisor import new_report, supervise
from benchmarks.gpu.table import final_table, summary
from wanx.errors import CancelledError, EnvironmentMismatchError, UsageError, WanxError

MINUTES = 8.0


def run(
    output: Path,
    *,
    minutes: float,
    only: Sequence[str] = (),
    quick: bool = False,
    rehearsal: bool = False,
    update_table: bool = False,
    started: float | None = None,
) -> Report:
    """Measure on the GPU, or rehearse on the processor.

    Args:
        output: the JSON file.
        minutes: for everything, from ``started``.
        only: beginnings of the names of items; without any, all.
        quick: 480P alone, and fewer rounds.
        rehearsal: tiny sizes on the processor.
        update_table: tune the package's own table.
        started: by :func:`time.time`; None is now.

    Raises:
        UsageError: a name, a number or a path cannot be.
        EnvironmentMismatchError: there is no GPU.
        WanxError: the report cannot be written.
    """
    if not minutes > 0:
        raise UsageError(f"--minutes is {minutes:g}; give a number above 0, such as {MINUTES:g}")
    models, sizes = ((REHEARSAL_MODEL,), (REHEARSAL_SIZE,)) if rehearsal else (MODELS, SIZES)
    if quick:
        sizes = sizes[:1]
    items = selected(all_items(models, sizes, quick=quick), only)
    if not rehearsal and not torch.cuda.is_available():
        raise EnvironmentMismatchError(
            "these measurements need an NVIDIA GPU, and PyTorch finds none here; `python -m "
            "wanx.kernels.aot_compile` compiles the kernels without one, and --rehearse runs "
            "everything at tiny sizes"
        )
    if not output.absolute().parent.is_dir():
        raise UsageError(f"cannot write {output}: No such folder; choose another -o")
    report = new_report(
        output, minutes=minutes, only=only, quick=quick, rehearsal=rehearsal,
        update_table=update_table, started=started,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="wanx-gpu-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        # The tiny transformer of a rehearsal has no programs.
        needs = [n for n in needed_programs(items) if not rehearsal or n == TINY]
        jobs = [job(need, folder) for need in needs]
        return supervise(report, folder, lambda line: print(line, flush=True), jobs=jobs)


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
    parser.add_argument("--rehearse", action="store_true", help="on the processor, at tiny sizes")
    parser.add_argument(
        "--update-table", action="store_true",
        help="tune the package's own tuned.json instead of a file beside the output",
    )  # fmt: skip
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop)
    try:
        report = run(
            arguments.output, minutes=arguments.minutes, only=arguments.only,
            quick=arguments.quick, rehearsal=arguments.rehearse,
            update_table=arguments.update_table, started=STARTED,
        )  # fmt: skip
    except WanxError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(f"stopped; {arguments.output} holds what was measured", file=sys.stderr)
        sys.exit(CancelledError.exit_code)
    print("\n".join(final_table(report)))
    print(summary(report))
    sys.exit(0 if any(item["status"] == "measured" for item in report.items) else 1)


if __name__ == "__main__":
    main()
