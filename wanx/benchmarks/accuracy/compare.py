"""Compare two bundles: teacher-forced per step, and free-running.

Gated is what each network answers to the reference's inputs. What the bundles draw on their own is
shown as a multiple of what one ulp of noise does to the reference, and never gated.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wanx.benchmarks.accuracy.clips import compare_clips, to_pixels
from wanx.benchmarks.accuracy.comparison import Agreement, Comparison, Gates, RunComparison, Subject
from wanx.benchmarks.accuracy.comparison import agreement as agree
from wanx.benchmarks.accuracy.subject import Case, Side, Start
from wanx.benchmarks.accuracy.teacher_forcing import (
    CandidateRun,
    ReferenceRun,
    record_reference,
    run_candidate,
)
from wanx.benchmarks.report.environment import environment
from wanx.bundle.reader import Bundle, Manifest
from wanx.config.models import ModelConfig
from wanx.errors import UsageError, WanxError
from wanx.progress import Progress, silent
from wanx.runtime.batch import read_jobs
from wanx.runtime.inputs.reading import read_inputs
from wanx.runtime.options import RunOptions, resolve


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Runs and gates of a comparison.

    Attributes:
        run: options of every run; what is left out is the reference's default.
        prompts: JSON Lines file with the options of one run a line, as for ``wanx run --prompts``;
            None makes one run.
        clips: whether both bundles also draw their own videos, which takes twice as long.
        gates: the least that passes.
        threads: of the processor; None takes all cores.
    """

    run: RunOptions = field(default_factory=lambda: RunOptions(seed=0))
    prompts: Path | None = None
    clips: bool = True
    gates: Gates = field(default_factory=Gates)
    threads: int | None = None


def compare(
    candidate: Bundle, reference: Bundle, options: CompareOptions, progress: Progress = silent
) -> Comparison:
    """Measure how close a bundle is to another one of the same model.

    No two networks are in memory at once. The reference's steps lie in a temporary folder until
    the candidate has answered them: three times the size of the latent for each step.

    Args:
        candidate: the bundle in question, opened.
        reference: what it should do, opened.
        options: what to put them through.
        progress: told how far each stage is.

    Raises:
        UsageError: the bundles are of different models, or the options do not suit them.
        WanxError: the reference itself is not finite, or the machine cannot run a bundle.
    """
    _require_same_model(candidate, reference)
    cases = list(_cases(options, reference.manifest.config))
    theirs = Side(role="reference", bundle=reference, threads=options.threads)
    ours = Side(role="candidate", bundle=candidate, threads=options.threads)
    steps = sum(case.run.steps for case in cases) * (2 if options.clips else 1)

    def counter(name: str, total: int) -> Callable[[], None]:
        return _counter(progress, name, total)

    their_starts = theirs.prepare(cases, counter("reference text", len(cases)))
    our_starts = ours.prepare(cases, counter("candidate text", len(cases)))
    with tempfile.TemporaryDirectory(prefix="wanx-compare-") as folder:
        recordings = record_reference(
            theirs, their_starts, Path(folder),
            clips=options.clips, on_step=counter("reference steps", steps),
        )  # fmt: skip
        candidate_runs = run_candidate(
            ours, our_starts, their_starts, recordings,
            clips=options.clips, on_step=counter("candidate steps", steps),
        )  # fmt: skip
    decoded = counter("decode", len(cases))
    runs = []
    for ours_at, theirs_at, recorded, candidate_run in zip(
        our_starts, their_starts, recordings, candidate_runs, strict=True
    ):
        encoders = _encoders(ours_at, theirs_at)
        runs.append(_judge(ours, theirs, recorded, candidate_run, encoders, theirs_at))
        decoded()
    return Comparison(
        candidate=Subject.of(candidate),
        reference=Subject.of(reference),
        gates=options.gates,
        runs=tuple(runs),
        layers=_layers(candidate.manifest),
        environment=environment(),
    )


def _judge(
    ours: Side,
    theirs: Side,
    recorded: ReferenceRun,
    candidate_run: CandidateRun,
    encoders: tuple[Agreement, ...],
    start: Start,
) -> RunComparison:
    """Decode the latents of a run and put together what is known of it."""
    health = [] if candidate_run.problem is None else [f"candidate: {candidate_run.problem}"]
    frames = list(theirs.decode(recorded.latent))
    decoder = agree(
        np.concatenate(list(ours.decode(recorded.latent)), axis=1),
        np.concatenate(frames, axis=1),
        component="vae_decoder",
    )
    reference, problem = to_pixels(frames)
    if reference is None:
        raise WanxError(
            f"in the reference {problem}, so nothing can be compared with it; check the bundle "
            "with `wanx verify` or export it at a higher precision"
        )
    if problem is not None:
        health.append(f"reference: {problem}")
    clip = None
    if candidate_run.latent is not None and recorded.ulp_baseline is not None:
        candidate, problem = to_pixels(ours.decode(candidate_run.latent))
        if problem is not None:
            health.append(f"candidate: {problem}")
        ulp_baseline, _ = to_pixels(theirs.decode(recorded.ulp_baseline))
        if candidate is not None and ulp_baseline is not None:
            clip = compare_clips(candidate, reference, ulp_baseline)
    return RunComparison(
        options=start.run,
        parts=(*encoders, decoder),
        steps=candidate_run.steps,
        clip=clip,
        health=tuple(health),
    )


def _encoders(ours: Start, theirs: Start) -> tuple[Agreement, ...]:
    """Compare what the encoders made of a run's prompts, images and videos."""
    agreements = [
        agree(ours.contexts[branch], context, component="text_encoder", branch=branch)
        for branch, context in theirs.contexts.items()
    ]
    images = [start.given.constants.get("image_context") for start in (ours, theirs)]
    if images[0] is not None and images[1] is not None:
        agreements.append(agree(images[0], images[1], component="image_encoder"))
    latents = [_encoded(start) for start in (ours, theirs)]
    if latents[0] is not None and latents[1] is not None:
        agreements.append(agree(latents[0], latents[1], component="vae_encoder"))
    return tuple(agreements)


def _encoded(start: Start) -> np.ndarray[Any, Any] | None:
    """The latents that the DiT is given, without the masks beside them, which nobody encoded."""
    config, given = start.config, start.given
    if given.channels is not None:
        return given.channels[config.vae.temporal_stride :]
    tokens = given.constants.get("vace_tokens")
    # Of a control video, the part that stays and the part that is drawn anew.
    features = 2 * config.vae.z_dim * config.dit.patch_volume
    return None if tokens is None else tokens[..., :features]


def _cases(options: CompareOptions, config: ModelConfig) -> Iterator[Case]:
    if config.task in ("i2v", "flf2v") and options.prompts is None and options.run.image is None:
        raise UsageError(
            f"a bundle for {config.task} starts from images; name them with --prompts, in lines "
            'such as {"prompt": "…", "image": "first.png"}'
        )
    for name, run in _runs(options):
        try:
            inputs = read_inputs(run, config.task)
            yield Case(run=resolve(run, config, inputs), inputs=inputs)
        except UsageError as error:
            raise UsageError(f"{name}{error}") from None


def _runs(options: CompareOptions) -> Iterator[tuple[str, RunOptions]]:
    """Each run with what to put before an error about it."""
    if options.prompts is None:
        yield "", options.run
        return
    for job in read_jobs(options.prompts, Path(), options.run, ".mp4"):
        name = f"{options.prompts}, {job.name}: "
        if isinstance(job.options, WanxError):
            raise UsageError(f"{name}{job.options}")
        yield name, job.options


def _require_same_model(candidate: Bundle, reference: Bundle) -> None:
    ours, theirs = (_sizes(bundle.manifest.config) for bundle in (candidate, reference))
    for name in theirs | ours:
        values = [sizes.get(name, "absent") for sizes in (ours, theirs)]
        if values[0] != values[1]:
            raise UsageError(
                f"{candidate.root} and {reference.root} are different models: {name} is "
                f"{values[0]} in the candidate and {values[1]} in the reference; compare bundles "
                "of one checkpoint"
            )


def _sizes(config: ModelConfig) -> dict[str, Any]:
    """The task and every size of every network, by dotted name."""
    networks = asdict(config)
    sizes: dict[str, Any] = {"task": networks.pop("task")}
    for network, values in networks.items():
        if network not in ("name", "defaults"):
            values = values or {"": None}
            sizes |= {f"{network}.{name}".rstrip("."): value for name, value in values.items()}
    return sizes


def _layers(manifest: Manifest) -> dict[str, float]:
    """SQNR of the 8-bit layers of the DiT, where the recipe holds it."""
    recipe = manifest.components["dit"].quantization
    layers = {} if recipe is None else recipe.layers
    return {name: it.sqnr_db for name, it in layers.items() if it.sqnr_db is not None}


def _counter(progress: Progress, stage: str, total: int) -> Callable[[], None]:
    """Turn a progress function into one that is told of each unit."""
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        progress(stage, done, total, "steps")

    progress(stage, 0, total, "steps")
    return count
