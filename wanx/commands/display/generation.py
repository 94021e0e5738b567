"""Progress bars on stderr; tables and summaries of bundles and videos on stdout."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from wanx.builtin.prompts import prompt_hint
from wanx.bundle.manifest import LoraRecord
from wanx.bundle.reader import Bundle, FileCheck
from wanx.commands.display.lines import format_bytes, format_seconds, progress_lines
from wanx.files.hub_cache import hub_name
from wanx.interruption import cleanup_on_sigint
from wanx.progress import Progress as ProgressCallback
from wanx.progress import Unit, no_progress

if TYPE_CHECKING:
    from wanx.exporter.export import ExportPlan
    from wanx.runtime.batch import Outcome
    from wanx.runtime.pipeline import Generation

# Without markup: paths and messages may hold brackets.
STDOUT = Console(highlight=False, soft_wrap=True, markup=False)


class _AmountColumn(ProgressColumn):
    """Done and total in the unit of the stage, then the time that is left."""

    def render(self, task: Task) -> Text:
        total = task.total or 0
        in_bytes = task.fields.get("unit") == "bytes"
        amount = (
            f"{format_bytes(task.completed)}/{format_bytes(total)}"
            if in_bytes
            else f"{task.completed:.0f}/{total:.0f}"
        )
        if task.finished:
            return Text(f"{amount}  {format_seconds(task.finished_time or 0)}")
        left = task.time_remaining
        rate = f"  {format_bytes(task.speed)}/s" if in_bytes and task.speed else ""
        return Text(f"{amount}{rate}" + ("" if left is None else f"  {format_seconds(left)} left"))


@contextmanager
def progress_bars(quiet: bool) -> Iterator[ProgressCallback]:
    """Yield a progress function: a bar per stage on a terminal, and else plain lines."""
    if quiet:
        yield no_progress
        return
    if not sys.stderr.isatty():
        with progress_lines() as report_line:
            yield report_line
        return
    columns = (TextColumn("{task.description:<20}"), BarColumn(bar_width=30), _AmountColumn())
    progress = Progress(*columns, console=Console(stderr=True))
    with cleanup_on_sigint(progress.stop), progress:
        tasks: dict[str, int] = {}

        def report(stage: str, done: int, total: int, unit: Unit) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total, unit=unit)
            progress.update(tasks[stage], completed=done)  # type: ignore[arg-type]

        yield report


class _StderrHandler(logging.Handler):
    """Writes each message to stderr once, above the bars where there are any."""

    def __init__(self) -> None:
        super().__init__()
        self._printed: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self._printed:
            self._printed.add(text)
            print(text, file=sys.stderr)


@contextmanager
def log_lines(quiet: bool, name: str) -> Iterator[None]:
    """Show the messages of a logger, and of downloads, on stderr; with ``quiet`` only warnings."""
    loggers = [logging.getLogger(one) for one in (name, "wanx.hub", "wanx.checkpoints")]
    handler, levels = _StderrHandler(), [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        if not quiet:
            logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
            logger.removeHandler(handler)


def print_plan(planned: ExportPlan) -> None:
    """Say what an export would fetch, write and take."""
    resolved, estimate = planned.resolved, planned.estimate
    checkpoint = resolved.checkpoint
    STDOUT.print(
        f"{checkpoint.config.name} ({checkpoint.config.task}, {checkpoint.layout} layout) "
        f"at {resolved.precision} to {resolved.output}"
    )
    table = Table("weights", "in the source", "in the bundle", "from", box=None, pad_edge=False)
    for group, count in estimate.weight_bytes.items():
        weights = checkpoint.components[group]
        first, *more = weights.files
        files = first.name + (f" and {len(more)} more" if more else "")
        table.add_row(group, format_bytes(weights.nbytes), format_bytes(count), files)
    STDOUT.print(table)
    _print_loras((*checkpoint.earlier_loras, *checkpoint.loras))
    STDOUT.print(
        f"bundle {format_bytes(estimate.bundle_bytes)}, "
        f"peak memory about {format_bytes(estimate.peak_memory_bytes)}, "
        f"time about {format_seconds(estimate.seconds)}, "
        f"of which calibration {format_seconds(estimate.calibration_seconds)}"
    )
    if planned.hub is not None:
        missing, whole = planned.hub.missing_bytes, planned.hub.nbytes
        cached = f", {format_bytes(whole - missing)} are in the cache" if missing < whole else ""
        STDOUT.print(f"to download: {format_bytes(missing)} of {format_bytes(whole)}{cached}")


def print_bundle(bundle: Bundle) -> None:
    """Summarise a bundle."""
    manifest = bundle.manifest
    defaults = manifest.defaults
    STDOUT.print(
        f"{hub_name(bundle.root) or bundle.root}\n"
        f"{manifest.name} ({manifest.task}) at {manifest.precision} for {manifest.target}, "
        f"{format_bytes(bundle.size_bytes)}, hash {bundle.hash[:12]}"
    )
    table = Table("component", "nodes", "stored tensors", "weights", box=None, pad_edge=False)
    for name, component in manifest.components.items():
        stored = ", ".join(f"{count} {dtype}" for dtype, count in sorted(component.storage.items()))
        table.add_row(name, str(component.nodes), stored, ", ".join(component.weights))
    STDOUT.print(table)
    STDOUT.print(
        f"defaults: {defaults.width}x{defaults.height}, {defaults.frames} frames, "
        + (
            f"preset {defaults.preset}"
            if defaults.preset
            else f"{defaults.steps} steps, "
            f"guide scale {defaults.guide_scale:g}, shift {defaults.shift:g}"
        )
    )
    if hint := prompt_hint(manifest):
        STDOUT.print(f"prompts: {hint}")
    source = manifest.provenance
    STDOUT.print(
        f"made by wanx {manifest.wanx_version} from {source.source} ({source.source_layout} "
        f"layout, {source.source_sha256[:12]}) on {source.created:%Y-%m-%d %H:%M} UTC"
    )
    _print_loras(source.loras)


def _print_loras(loras: Iterable[LoraRecord]) -> None:
    for lora in loras:
        left = f", {len(lora.unmatched)} fit nothing" if lora.unmatched else ""
        STDOUT.print(
            f"with {lora.file} ({lora.sha256[:12]}) at {lora.strength:g}: {lora.matched} tensors"
            f"{left}"
        )


def print_generation(result: Generation, bundle: Bundle) -> None:
    """Say what was generated and what it took."""
    run = result.options
    STDOUT.print(
        f"wrote {result.path}: {run.width}x{run.height}, {run.frames} frames, seed {run.seed}, "
        f"by {bundle.manifest.name} at {bundle.manifest.precision}"
    )
    stages = (f"{s.name} {format_seconds(s.load_seconds + s.seconds)}" for s in result.stages)
    peaks = [s.peak_bytes for s in result.stages if s.peak_bytes is not None]
    STDOUT.print(
        " · ".join(stages) + (f" · peak memory {format_bytes(max(peaks))}" if peaks else "")
    )


def print_outcome(outcome: Outcome, bundle: Bundle) -> None:
    """Say what became of one job of a batch."""
    if outcome.result is not None:
        print_generation(outcome.result, bundle)
    elif outcome.error is not None:
        STDOUT.print(Text("failed", style="red"), f"{outcome.job.name}: {outcome.error}")
    else:
        why = "is being made by another process" if outcome.claimed else "is there"
        STDOUT.print(f"{outcome.job.output} {why}; skipped")


def print_outcomes(outcomes: Sequence[Outcome]) -> None:
    """Count what became of a batch, and repeat what failed."""
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    done = sum(outcome.result is not None for outcome in outcomes)
    skipped = len(outcomes) - done - len(failed)
    STDOUT.print(f"{done} written, {skipped} skipped, {len(failed)} failed")
    if len(outcomes) > len(failed):  # otherwise they are still on the screen
        for outcome in failed:
            STDOUT.print(Text("failed", style="red"), f"{outcome.job.name}: {outcome.error}")


def print_checks(checks: Sequence[FileCheck]) -> None:
    """List the damaged files, or say that there are none."""
    bad = [check for check in checks if check.problem]
    for check in bad:
        STDOUT.print(Text("bad", style="red"), check.problem)
    STDOUT.print(f"{len(checks) - len(bad)} of {len(checks)} files are as the manifest says")
