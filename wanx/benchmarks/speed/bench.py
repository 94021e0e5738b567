"""A whole benchmark: trials, analyses, and the files of the report."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from wanx.benchmarks.report.files import dumps, json_safe, prepare_folder, write_files
from wanx.benchmarks.speed.analysis import require_packages, with_rooflines
from wanx.benchmarks.speed.pages.markdown import to_markdown
from wanx.benchmarks.speed.pages.page import Stills, render
from wanx.benchmarks.speed.pages.stills import read_stills
from wanx.benchmarks.speed.peers import with_agreements
from wanx.benchmarks.speed.results import Results, pluralize, with_problem
from wanx.benchmarks.speed.suite import Suite, measure
from wanx.benchmarks.speed.sweep import default_sizes, sweep
from wanx.errors import CancelledError, WanxError
from wanx.progress import Progress, no_progress
from wanx.runtime.sizes import check_size

DATA, PAGE, TABLE = "report.json", "report.html", "report.md"
# Of the published models; what they take is predicted where a sweep fits it.
_SIZES = ((832, 480, 81), (1280, 720, 81))


@dataclass(frozen=True, kw_only=True)
class Extras:
    """Measurements beside the trials.

    Attributes:
        roofline: how close each part comes to what the machine can do.
        profile: the most expensive operations too.
        sweep: how a step grows with the number of tokens.
        sweep_sizes: width, height and frames; without any, lengths of the first case.
    """

    roofline: bool = True
    profile: bool = False
    sweep: bool = False
    sweep_sizes: Sequence[tuple[int, int, int]] = ()


def bench(
    suite: Suite, folder: Path, extras: Extras, *, progress: Progress = no_progress
) -> Results:
    """Measure, and write ``report.json``, ``report.html`` and ``report.md`` into ``folder``.

    The JSON is written after each trial, so that what was measured survives whatever happens.

    Raises:
        CancelledError: it was interrupted; what was measured is in the report, marked incomplete.
        EnvironmentMismatchError: the packages of ``wanx[report]`` are missing.
        UsageError: the folder cannot be had, or there is no video of a size to sweep.
        WanxError: the disk is full.
    """
    for size in extras.sweep_sizes:
        check_size(*size, suite.bundles[0].manifest.config)
    prepare_folder(folder)
    if extras.roofline:
        require_packages()
    latest = suite.plan
    unfinished = "it ended before everything was measured"

    def keep(results: Results) -> None:
        nonlocal latest
        latest = results
        write_files({folder / DATA: dumps(json_safe(with_problem(results, unfinished).to_json()))})

    with tempfile.TemporaryDirectory(prefix="wanx-bench-") as name:
        work = Path(name)
        interrupted = False
        keep(latest)
        try:
            keep(measure(suite, work, on_trial=keep, progress=progress))
            keep(with_agreements(latest, work))
            if extras.roofline:
                keep(with_rooflines(latest, suite, operations=extras.profile, progress=progress))
            if extras.sweep:
                keep(_with_sweeps(latest, suite, extras, progress))
        except KeyboardInterrupt:
            interrupted = True
            latest = with_problem(
                latest, f"interrupted after {pluralize(len(latest.trials), 'trial')}"
            )
        write_report(latest, folder, read_stills(latest, work))
    if interrupted:
        raise CancelledError(
            f"interrupted; what was measured so far is in {folder}, marked incomplete"
        )
    return latest


def write_report(results: Results, folder: Path, stills: Stills | None = None) -> None:
    """Write the three files of a report, replacing those of an earlier one."""
    write_files(
        {
            folder / DATA: dumps(json_safe(results.to_json())),
            folder / PAGE: render(results, stills),
            folder / TABLE: to_markdown(results),
        }
    )


def _with_sweeps(results: Results, suite: Suite, extras: Extras, progress: Progress) -> Results:
    case = results.cases[0]
    for index, (subject, bundle) in enumerate(zip(results.subjects, suite.bundles, strict=True)):
        if subject.peer is not None:
            continue
        sizes = extras.sweep_sizes or default_sizes(bundle, case.width, case.height, case.frames)
        try:
            swept = sweep(
                bundle,
                sizes,
                subject=index,
                branches=1 if case.guide_scale == 1 else 2,
                warm_up=results.settings.warm_up,
                threads=suite.options.threads,
                provider=suite.options.provider,
                predict=_SIZES,
                progress=progress,
            )
        except WanxError as error:
            results = with_problem(results, f"{subject.label}, sweep: {error}")
        else:
            results = replace(results, sweep=(*results.sweep, swept))
    return results
