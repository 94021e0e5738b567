"""Runs a benchmark: every subject makes every video in every round, taking turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wanx.benchmarks.peers.requirements import require_peer
from wanx.benchmarks.speed.results import Case, Peer, Results, Settings, Subject, Trial
from wanx.benchmarks.speed.sample_images import as_json, with_sample_images
from wanx.benchmarks.speed.trial import run_trial
from wanx.bundle.reader import Bundle
from wanx.bundle.record import printable
from wanx.config.bounds import MAX_REPEATS, MAX_THREADS, require_between
from wanx.config.models import ModelConfig
from wanx.errors import UsageError, WanxError
from wanx.progress import Progress, Unit, no_progress
from wanx.runtime.inputs.reading import read_inputs
from wanx.runtime.options import RunOptions
from wanx.runtime.resolve import resolve
from wanx.runtime.sessions.onnxruntime.providers import AUTO
from wanx.runtime.sessions.registry import backend_of, require_provider
from wanx.runtime.sizes import check_size, latent_shape
from wanx.runtime.tokens import token_grid

_PROMPT = "a cat surfing on a wave at sunset, film grain"


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Videos, rounds and peers to measure.

    Attributes:
        run: options of every video; sizes and frames left out.
        sizes: width and height of the videos; without any, the first bundle's own.
        frames: of the videos; None is the first bundle's own.
        repeat: rounds.
        warm_up: first steps of a trial that do not count as ``step``; None: as many as the
            slowest-starting subject needs.
        baseline: label of the subject that the others are compared with; None is the first.
        peers: other implementations to measure on the first bundle's weights.
        threads: of the processor; None takes all cores.
        provider: of ONNX Runtime, as :class:`wanx.runtime.pipeline.Pipeline` takes it.
    """

    run: RunOptions = field(default_factory=lambda: RunOptions(seed=0))
    sizes: tuple[tuple[int, int], ...] = ()
    frames: int | None = None
    repeat: int = 3
    warm_up: int | None = None
    baseline: str | None = None
    peers: tuple[Peer, ...] = ()
    threads: int | None = None
    provider: str = AUTO


@dataclass(frozen=True, kw_only=True, eq=False)
class Suite:
    """A checked benchmark.

    Attributes:
        bundles: of each subject.
        plan: what there is to measure; no trial yet.
        runs: the options of each case, all but the prompt decided.
        options: as given.
    """

    bundles: tuple[Bundle, ...]
    plan: Results
    runs: tuple[RunOptions, ...]
    options: BenchOptions


def prepare(bundles: Sequence[Bundle], options: BenchOptions, command: str) -> Suite:
    """Check what is to be measured, before anything is.

    Args:
        bundles: at least one.
        options: what to measure.
        command: that makes this benchmark.

    Raises:
        EnvironmentMismatchError: what a peer needs is not installed.
        UsageError: the bundles are not for one task, or an option is out of range.
    """
    if options.peers:
        require_peer(bundles[0])
    require_between("--repeat", options.repeat, 1, MAX_REPEATS)
    require_between("threads", options.threads, 1, MAX_THREADS)
    require_provider(options.provider)
    tasks = {bundle.manifest.task for bundle in bundles}
    if len(tasks) > 1:
        tasks_by_bundle = ", ".join(
            f"{bundle.root.name} is {bundle.manifest.task}" for bundle in bundles
        )
        raise UsageError(
            f"the bundles are for different tasks ({tasks_by_bundle}); give bundles of one task"
        )
    labels = _labels(bundles)
    subjects = [Subject.of(b, label) for b, label in zip(bundles, labels, strict=True)]
    subjects += [Subject.of(bundles[0], peer, peer) for peer in options.peers]
    runs = _runs(bundles[0].manifest.config, options)
    cases = tuple(_case(run, bundles[0].manifest.config) for run in runs)
    needed = max(backend_of(subject.target, options.provider).warm_up_runs for subject in subjects)
    warm_up = needed if options.warm_up is None else options.warm_up
    least = min(case.steps for case in cases)
    if options.warm_up is None:
        warm_up = min(warm_up, max(0, least - 1))
    if not 0 <= warm_up < least:
        raise UsageError(
            f"--warm-up {warm_up} leaves none of {least} steps to measure; give 0 to {least - 1}"
        )
    settings = Settings(
        repeat=options.repeat,
        warm_up=warm_up,
        baseline=_baseline(options.baseline, [subject.label for subject in subjects]),
        threads=options.threads,
        provider=options.provider,
    )
    plan = Results(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        settings=settings,
        subjects=tuple(subjects),
        cases=cases,
    )
    every = (*bundles, *[bundles[0]] * len(options.peers))
    return Suite(bundles=every, plan=plan, runs=tuple(runs), options=options)


def measure(
    suite: Suite,
    folder: Path,
    *,
    on_trial: Callable[[Results], None] = lambda results: None,
    progress: Progress = no_progress,
) -> Results:
    """Run the trials.

    A subject that fails is left out of the following rounds, and named in the problems.

    Args:
        suite: from :func:`prepare`.
        folder: for the videos and latents of the trials, named by :func:`trial_name`.
        on_trial: told what there is after each trial.
        progress: told how far the benchmark and its current trial are.
    """
    results, failed = suite.plan, set[int]()
    options = [as_json(run, folder, f"c{case}") for case, run in enumerate(suite.runs)]
    count = len(suite.bundles)
    total = suite.options.repeat * len(suite.runs) * count
    done = 0
    for number in range(suite.options.repeat):
        for case in range(len(suite.runs)):
            # Drift hits all alike: the order turns round from round to round.
            order = range(count) if number % 2 == 0 else range(count - 1, -1, -1)
            for subject in order:
                progress("trials", done, total, "steps")
                done += 1
                if subject in failed:
                    continue
                try:
                    trial = _trial(suite, options, folder, subject, case, number, progress)
                except WanxError as error:
                    failed.add(subject)
                    label = results.subjects[subject].label
                    problem = f"{label}, {results.cases[case].label}: {error}"
                    results = replace(results, problems=(*results.problems, problem))
                else:
                    results = replace(results, trials=(*results.trials, trial))
                on_trial(results)
    progress("trials", total, total, "steps")
    return results


def trial_name(subject: int, case: int, number: int) -> str:
    """The name of a trial's files."""
    return f"s{subject}-c{case}-r{number}"


def _trial(
    suite: Suite,
    options: Sequence[Mapping[str, Any]],
    folder: Path,
    subject: int,
    case: int,
    number: int,
    progress: Progress,
) -> Trial:
    described = suite.plan.subjects[subject]

    def report(stage: str, done: int, total: int, unit: Unit) -> None:
        progress(f"{described.label}: {stage}", done, total, unit)

    outcome = run_trial(
        suite.bundles[subject],
        options[case],
        folder,
        name=trial_name(subject, case, number),
        peer=described.peer,
        threads=suite.options.threads,
        provider=suite.options.provider,
        progress=report,
    )
    return Trial(subject=subject, case=case, round=number, **outcome)


def _labels(bundles: Sequence[Bundle]) -> list[str]:
    """The folders' names, numbered where two are equal."""
    names = [printable(bundle.root.name) for bundle in bundles]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: index + 1].count(name)})"
        for index, name in enumerate(names)
    ]


def _baseline(name: str | None, labels: Sequence[str]) -> int:
    if name is None:
        return 0
    label = Path(name).name
    if label not in labels:
        raise UsageError(f"--baseline {name} is not measured here; choose {', '.join(labels)}")
    return labels.index(label)


def _runs(config: ModelConfig, options: BenchOptions) -> list[RunOptions]:
    defaults = config.defaults
    runs = []
    frames = defaults.frames if options.frames is None else options.frames
    for width, height in options.sizes or ((defaults.width, defaults.height),):
        check_size(width, height, frames, config)  # images are made of that size
        run = replace(
            options.run,
            width=width,
            height=height,
            frames=frames,
            prompt=options.run.prompt or defaults.prompt or _PROMPT,
        )
        runs.append(with_sample_images(run, config.task, width, height))
    return runs


def _case(options: RunOptions, config: ModelConfig) -> Case:
    inputs = read_inputs(options, config.task)
    run = resolve(options, config, inputs)
    _, times, rows, columns = latent_shape(run.width, run.height, run.frames, config.vae)
    whole = (config.vae.z_dim, times + len(inputs.references), rows, columns)
    return Case(
        width=run.width,
        height=run.height,
        frames=run.frames,
        latent_frames=times,
        tokens=math.prod(token_grid(whole, config.dit.patch_size)),
        steps=run.steps,
        prompt=run.prompt,
        guide_scale=max(run.guidance.scales),
        shift=run.shift,
        solver=run.solver,
        seed=run.seed,
    )
