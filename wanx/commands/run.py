"""The command ``wanx run``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wanx.commands.completion import complete_bundle, complete_preset, complete_solver
from wanx.commands.options import (
    Fallback,
    Json,
    Provider,
    Quiet,
    Threads,
    local_bundle,
    option,
    print_json,
)
from wanx.config.bounds import MAX_VIDEOS
from wanx.errors import UsageError

if TYPE_CHECKING:
    from wanx.progress import Progress
    from wanx.runtime.batch import Job
    from wanx.runtime.pipeline import Generation, Pipeline


def run(
    bundle: Annotated[
        str | None,
        typer.Argument(
            help="Folder of the bundle; left out, the built-in tiny model.",
            autocompletion=complete_bundle,
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Argument(help="What the video shows.")] = None,
    output: Annotated[
        Path | None,
        option(
            "--output",
            "-o",
            help="File to write: .mp4, .webm, .gif, .png for one frame. For --prompts: a folder.",
            show_default="out.mp4 or out.png, numbered if taken",
        ),
    ] = None,
    image: Annotated[Path | None, option(help="First frame (i2v, flf2v).")] = None,
    last_image: Annotated[Path | None, option(help="Last frame (flf2v).")] = None,
    video: Annotated[Path | None, option(help="Video that controls the new one (vace).")] = None,
    mask: Annotated[
        Path | None, option(help="Video that is white where --video is drawn anew (vace).")
    ] = None,
    reference: Annotated[
        list[Path] | None,
        option(metavar="<path>", help="Image of what to show; may be repeated (vace)."),
    ] = None,
    vace_scale: Annotated[
        float | None, option(help="Weight of the control.", show_default="1")
    ] = None,
    size: Annotated[
        str | None,
        option(
            help="Width x height, such as 832x480; only the area where an input sets the shape."
        ),
    ] = None,
    frames: Annotated[int | None, option(help="Frames: a multiple of 4, plus 1.")] = None,
    steps: Annotated[int | None, option(help="Denoising steps.")] = None,
    preset: Annotated[
        str | None,
        option(
            help="Solver, steps and guidance of a distilled model, such as lightx2v-4step.",
            show_default="the bundle's own; none switches it off",
            autocompletion=complete_preset,
        ),
    ] = None,
    guide_scale: Annotated[
        str | None,
        option(
            help="Weight of the prompt; 1 switches guidance off, 5@0-40% gives it to a part "
            "of the run."
        ),
    ] = None,
    cfg_zero: Annotated[
        bool, option("--cfg-zero", help="CFG-Zero*: scaled guidance, and first steps of zero.")
    ] = False,
    apg: Annotated[
        bool, option("--apg", help="Guidance without what is parallel to the prompt's prediction.")
    ] = False,
    guidance_rescale: Annotated[
        float | None,
        option(help="Share of the guided prediction that keeps the prompt's deviation, 0 to 1."),
    ] = None,
    cache: Annotated[
        str | None,
        option(
            help="Predict some steps from others: a speedup such as 2x, easy[:threshold], or off.",
            show_default="off",
        ),
    ] = None,
    speedup: Annotated[
        float | None, option(help="The same as --cache with an x.", show_default="1")
    ] = None,
    shift: Annotated[
        float | None, option(help="Shift of the noise schedule; lower at 480P for i2v.")
    ] = None,
    solver: Annotated[
        str | None,
        option(
            help="unipc, dpm++, euler, lcm, rcm or rcm-ode.",
            show_default="unipc",
            autocompletion=complete_solver,
        ),
    ] = None,
    timesteps: Annotated[
        str | None, option(help="What the model is fed, such as 1000,750,500,250.")
    ] = None,
    warp: Annotated[bool, option("--warp", help="Apply the shift to --timesteps.")] = False,
    sigmas: Annotated[
        str | None, option(help="Noise levels of the steps, such as 1,0.9375,0.8333,0.625.")
    ] = None,
    seed: Annotated[int, option(help="Seed of the noise; -1 draws one.")] = -1,
    negative_prompt: Annotated[
        str | None, option(help='What the video should not show; "" is nothing, not the default.')
    ] = None,
    fps: Annotated[int | None, option(help="Frames per second of the file.")] = None,
    count: Annotated[
        int, option(min=1, max=MAX_VIDEOS, help="How many, with successive seeds.")
    ] = 1,
    prompts: Annotated[
        Path | None,
        option(
            help="JSON Lines: an object of options for each video; or .txt, a prompt a line. "
            "Finished videos are skipped."
        ),
    ] = None,
    vram_budget: Annotated[
        str | None,
        option(
            help="GPU memory to take, such as 12G. TensorRT streams the weights beyond it.",
            show_default="what is free",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        option(
            help="Host memory to take, such as 8G. Frames that do not fit are computed in tiles.",
            show_default="what is free",
        ),
    ] = None,
    provider: Provider = "auto",
    fallback: Fallback = False,
    threads: Threads = None,
    dry_run: Annotated[
        bool, option("--dry-run", help="Say what the run takes, and run nothing.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Generate a video from a prompt, and from images or videos where the task takes them.

    Options that are left out take the bundle's defaults. The built-in tiny models know prompts of
    the form "a COLOUR SHAPE moving DIRECTION on a BACKGROUND background" only: colours red, green,
    blue, yellow, purple, orange; shapes circle, square, triangle; directions left, right, up, down;
    backgrounds black, white, gray, blue.
    """
    import wanx
    from wanx.commands.display.generation import log_lines, print_generation, progress_bars
    from wanx.commands.display.run_plan import print_run_plan, run_plan_facts
    from wanx.commands.leftovers import find_leftovers
    from wanx.memory_size import parse_budget
    from wanx.runtime.batch import read_jobs, seeds
    from wanx.runtime.options import RunOptions, parse_numbers
    from wanx.runtime.output.claims import claimed_name
    from wanx.runtime.sizes import parse_size

    named, text = _bundle_and_prompt(bundle, prompt)
    width, height = (None, None) if size is None else parse_size(size)
    options = RunOptions(
        prompt=text, negative_prompt=negative_prompt, width=width, height=height, frames=frames,
        fps=fps, steps=steps, preset=preset, guide_scale=guide_scale, cfg_zero=cfg_zero, apg=apg,
        guidance_rescale=guidance_rescale, shift=shift, solver=solver, warp=warp,
        timesteps=parse_numbers("timesteps", timesteps or ()),
        sigmas=parse_numbers("sigmas", sigmas or ()), cache=cache, speedup=speedup, seed=seed,
        image=image, last_image=last_image, video=video, mask=mask,
        references=tuple(reference or ()), vace_scale=vace_scale,
    )  # fmt: skip
    suffix = ".png" if frames == 1 else ".mp4"
    if prompts is not None and count > 1:
        raise UsageError("--count and --prompts do not go together; give each seed a line")
    if prompts is not None and dry_run:
        raise UsageError("--dry-run and --prompts do not go together; give one prompt")
    budget = None if vram_budget is None else parse_budget("--vram-budget", vram_budget)
    limit = None if memory is None else parse_budget("--memory", memory)
    load = partial(
        wanx.load,
        None if named is None else local_bundle(named, quiet),
        threads=threads,
        vram_budget=budget,
        memory=limit,
        provider=provider,
        fallback=fallback,
    )
    if dry_run:
        with log_lines(quiet, "wanx.runtime"):
            plan = load().plan(options)
        if as_json:
            print_json(run_plan_facts(plan))
        else:
            print_run_plan(plan)
        return
    find_leftovers((output or Path("out")).parent, remove=True)
    with log_lines(quiet, "wanx.runtime"):
        if prompts is not None:
            jobs = read_jobs(prompts, _batch_folder(output), options, suffix)
            _run_jobs(load(), jobs, progress_bars(quiet), as_json, resume=True)
            return
        path = output or Path(f"out{suffix}")
        if count > 1:
            jobs = seeds(options, list(itertools.islice(_numbered(path), count)))
            names = _numbered(path) if output is None else None
            _run_jobs(load(), jobs, progress_bars(quiet), as_json, resume=False, names=names)
            return
        free = claimed_name(itertools.chain([path], _numbered(path)))
        with (
            progress_bars(quiet) as progress,
            free if output is None else nullcontext(output) as name,
        ):
            pipeline = load()
            result = pipeline.run(options, output=name, progress=progress)
    if as_json:
        print_json(_generation_facts(result, pipeline))
    else:
        print_generation(result, pipeline.bundle)


def _run_jobs(
    pipeline: Pipeline,
    jobs: Sequence[Job],
    progress_bars: AbstractContextManager[Progress],
    as_json: bool,
    *,
    resume: bool,
    names: Iterator[Path] | None = None,
) -> None:
    """Run a batch and report it; exit 1 if any job failed."""
    from wanx.commands.display.generation import print_outcome, print_outcomes
    from wanx.runtime.batch import run_jobs

    outcomes = []
    with progress_bars as progress:
        current = ""

        def on_start(number: int, job: Job) -> None:
            nonlocal current
            current = job.name
            progress("videos", number, len(jobs), "steps")

        def report(stage: str, done: int, total: int, unit: Any) -> None:
            progress(f"{current}: {stage}", done, total, unit)

        for outcome in run_jobs(
            pipeline, jobs, on_start, resume=resume, names=names, progress=report
        ):
            outcomes.append(outcome)
            if not as_json:
                print_outcome(outcome, pipeline.bundle)
        progress("videos", len(jobs), len(jobs), "steps")
    if as_json:
        print_json(
            [
                {"name": outcome.job.name, "output": str(outcome.job.output)}
                | ({"claimed": True} if outcome.claimed else {})
                | ({"error": str(outcome.error)} if outcome.error else {})
                | (_generation_facts(outcome.result, pipeline) if outcome.result else {})
                for outcome in outcomes
            ]
        )
    else:
        print_outcomes(outcomes)
    if any(outcome.error for outcome in outcomes):
        raise typer.Exit(1)


def _generation_facts(result: Generation, pipeline: Pipeline) -> dict[str, Any]:
    cut: dict[str, Any] = {"cut": result.cut} if result.cut else {}
    if result.cache is not None:
        cut["cache"] = {
            "source": result.cache.source,
            "forwards_without": result.cache.all_forwards,
            "predicted_error": result.cache.error,
        }
    return (
        {"output": str(result.path), "bundle": pipeline.bundle.hash}
        | cut
        | {
            "options": asdict(result.options),
            "forwards": result.forwards,
            "predicted_steps": result.predicted,
            "stages": [asdict(stage) for stage in result.stages],
        }
    )


def _bundle_and_prompt(first: str | None, second: str | None) -> tuple[str | None, str | None]:
    """Distinguish a bundle from a prompt where only one of the two is there."""
    from wanx.builtin import BUILTIN
    from wanx.hub.reference import hub_reference

    if first is None:
        return None, None
    if second is not None or first in BUILTIN or Path(first).is_dir() or hub_reference(first):
        return first, second
    if " " not in first.strip() or first.startswith((".", "/", "~")):
        raise UsageError(
            f"{first!r} is neither a bundle nor a prompt of several words; "
            "for the built-in model and a short prompt write: wanx run tiny PROMPT"
        )
    return None, first


def _batch_folder(output: Path | None) -> Path:
    folder = output or Path("out")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--prompts needs a folder, and {folder} cannot be one: {error.strerror}; "
            "choose another with -o"
        ) from None
    return folder


def _numbered(path: Path) -> Iterator[Path]:
    """Yield a path with -1, -2, … after its stem."""
    return (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(1))
