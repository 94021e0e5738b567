"""Comparison of a candidate bundle with a reference bundle of the same model.

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
from numpy.typing import NDArray

from wanx.accuracy.gates import Agreement, Gates
from wanx.accuracy.gates import agreement as agree
from wanx.benchmarks.accuracy.clips import compare_clips, to_pixels
from wanx.benchmarks.accuracy.comparison import Comparison, RunComparison, Subject
from wanx.benchmarks.accuracy.teacher_forcing import (
    CandidateRun,
    ReferenceRun,
    run_candidate,
    run_reference,
)
from wanx.benchmarks.report.environment import environment
from wanx.bundle.reader import Bundle, Manifest
from wanx.config.models import ModelConfig
from wanx.errors import UsageError, WanxError
from wanx.progress import Progress, no_progress, step_counter
from wanx.runtime.batch import read_jobs
from wanx.runtime.inputs.reading import Inputs, read_inputs
from wanx.runtime.options import ResolvedRun, RunOptions
from wanx.runtime.resolve import resolve
from wanx.runtime.run_parts import EncodedRun, RunParts
from wanx.runtime.vae.decode import floats
from wanx.runtime.vae.parts import require_parts

Float32 = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Runs of two bundles, and the gates that their agreement must pass.

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
    candidate: Bundle, reference: Bundle, options: CompareOptions, progress: Progress = no_progress
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
    for bundle in (candidate, reference):
        require_parts(bundle.root, bundle.manifest)
    cases = list(_cases(options, reference.manifest.config))
    theirs = RunParts.of(reference, threads=options.threads)
    ours = RunParts.of(candidate, threads=options.threads)
    steps = sum(run.steps for run, _ in cases) * (2 if options.clips else 1)

    def counter(name: str, total: int) -> Callable[[], None]:
        return step_counter(progress, name, total)

    their_runs = theirs.encode(cases, counter("reference text", len(cases)))
    our_runs = ours.encode(cases, counter("candidate text", len(cases)))
    with tempfile.TemporaryDirectory(prefix="wanx-compare-") as folder:
        references = run_reference(
            theirs, their_runs, Path(folder),
            clips=options.clips, on_step=counter("reference steps", steps),
        )  # fmt: skip
        candidates = run_candidate(
            ours, our_runs, their_runs, references,
            clips=options.clips, on_step=counter("candidate steps", steps),
        )  # fmt: skip
    count_decoded = counter("decode", len(cases))
    runs = []
    for our_run, their_run, their_result, our_result in zip(
        our_runs, their_runs, references, candidates, strict=True
    ):
        encoders = _encoders(our_run, their_run)
        runs.append(_compared(ours, theirs, their_result, our_result, encoders, their_run.run))
        count_decoded()
    return Comparison(
        candidate=Subject.of(candidate),
        reference=Subject.of(reference),
        gates=options.gates,
        runs=tuple(runs),
        layers=_layers(candidate.manifest),
        environment=environment(),
    )


def _compared(
    ours: RunParts,
    theirs: RunParts,
    their_result: ReferenceRun,
    our_result: CandidateRun,
    encoders: tuple[Agreement, ...],
    run: ResolvedRun,
) -> RunComparison:
    """Decode the latents of a run, and compare the videos."""
    health = [] if our_result.problem is None else [f"candidate: {our_result.problem}"]
    frames = list(_frames(theirs, their_result.latent))
    decoder = agree(
        np.concatenate(list(_frames(ours, their_result.latent))),
        np.concatenate(frames),
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
    if our_result.latent is not None and their_result.ulp_baseline is not None:
        candidate, problem = to_pixels(_frames(ours, our_result.latent))
        if problem is not None:
            health.append(f"candidate: {problem}")
        floor, _ = to_pixels(_frames(theirs, their_result.ulp_baseline))
        if candidate is not None and floor is not None:
            clip = compare_clips(candidate, reference, floor)
    return RunComparison(
        options=run,
        parts=(*encoders, decoder),
        steps=our_result.steps,
        clip=clip,
        health=tuple(health),
    )


def _frames(parts: RunParts, latent: Float32) -> Iterator[Float32]:
    """Frames ``[n, H, W, 3]`` of a latent ``[C, T, h, w]``, as the decoder answers them."""
    return parts.decode(latent, floats)


def _encoders(ours: EncodedRun, theirs: EncodedRun) -> tuple[Agreement, ...]:
    """Compare the encoded prompts, images and videos of a run."""
    agreements = [
        agree(ours.contexts[branch], context, component="text_encoder", branch=branch)
        for branch, context in theirs.contexts.items()
    ]
    images = [run.conditioning.constants.get("image_context") for run in (ours, theirs)]
    if images[0] is not None and images[1] is not None:
        agreements.append(agree(images[0], images[1], component="image_encoder"))
    latents = [_encoded(run) for run in (ours, theirs)]
    if latents[0] is not None and latents[1] is not None:
        agreements.append(agree(latents[0], latents[1], component="vae_encoder"))
    return tuple(agreements)


def _encoded(run: EncodedRun) -> np.ndarray[Any, Any] | None:
    """The encoded latents of the DiT's inputs, without the masks, which nobody encoded."""
    config, conditioning = run.config, run.conditioning
    if conditioning.channels is not None:
        return conditioning.channels[config.vae.temporal_stride :]
    tokens = conditioning.constants.get("vace_tokens")
    # Of a control video, the part that stays and the part that is drawn anew.
    features = 2 * config.vae.z_dim * config.dit.patch_volume
    return None if tokens is None else tokens[..., :features]


def _cases(options: CompareOptions, config: ModelConfig) -> Iterator[tuple[ResolvedRun, Inputs]]:
    if config.task in ("i2v", "flf2v") and options.prompts is None and options.run.image is None:
        raise UsageError(
            f"a bundle for {config.task} starts from images; name them with --prompts, in lines "
            'such as {"prompt": "…", "image": "first.png"}'
        )
    for name, run_options in _runs(options):
        try:
            inputs = read_inputs(run_options, config.task)
            yield resolve(run_options, config, inputs), inputs
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
