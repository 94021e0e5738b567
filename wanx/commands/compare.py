"""The command ``wanx compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wanx.commands.completion import complete_bundle
from wanx.commands.options import Json, Quiet, Threads, local_bundle, option, print_json
from wanx.errors import GateError, UsageError


def compare(
    candidate: Annotated[
        str,
        typer.Argument(
            help="Folder of the bundle in question, or a built-in one.",
            autocompletion=complete_bundle,
        ),
    ],
    reference: Annotated[
        str,
        typer.Argument(
            help="Folder of the bundle that it should equal, or a built-in one.",
            autocompletion=complete_bundle,
        ),
    ],
    output: Annotated[
        Path | None,
        option("--output", "-o", help="Folder for accuracy.html and accuracy.json."),
    ] = None,
    prompt: Annotated[
        str | None, option(help="What the videos show.", show_default="the reference's own")
    ] = None,
    prompts: Annotated[
        Path | None, option(help="JSON Lines: an object of options, images too, for each run.")
    ] = None,
    size: Annotated[str | None, option(help="Width x height, such as 832x480.")] = None,
    frames: Annotated[int | None, option(help="Frames: a multiple of 4, plus 1.")] = None,
    steps: Annotated[int | None, option(help="Denoising steps.")] = None,
    seed: Annotated[int, option(help="Seed of the noise; -1 draws one.")] = 0,
    clips: Annotated[
        bool, option("--clips/--no-clips", help="Compare whole videos too; takes twice as long.")
    ] = True,
    gate: Annotated[bool, option("--gate", help="Exit 3 if the candidate fails a gate.")] = False,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure the accuracy of a bundle against another one of the same model.

    Every network gets the reference's inputs, and its answers are gated. Videos are reported as
    multiples of what one ulp of noise does to the reference.
    """
    import wanx
    from wanx.benchmarks.accuracy.files import write_accuracy
    from wanx.benchmarks.report.files import prepare_folder
    from wanx.commands.display.accuracy import print_comparison
    from wanx.commands.display.generation import progress_bars
    from wanx.commands.leftovers import find_leftovers
    from wanx.runtime.sizes import parse_size

    if prompt is not None and prompts is not None:
        raise UsageError("--prompt and --prompts do not go together; give the prompt a line")
    if output is not None:
        prepare_folder(output)
    width, height = (None, None) if size is None else parse_size(size)
    find_leftovers((output or Path("report")).parent, remove=True)
    local = [local_bundle(bundle, quiet) for bundle in (candidate, reference)]
    with progress_bars(quiet) as progress:
        comparison = wanx.compare(
            *local, prompts=prompts, clips=clips, threads=threads, progress=progress,
            prompt=prompt, width=width, height=height, frames=frames, steps=steps, seed=seed,
        )  # fmt: skip
    files = () if output is None else write_accuracy(comparison, output)
    if as_json:
        print_json(comparison.to_json())
    else:
        print_comparison(comparison, files)
    problems = comparison.problems
    if gate and problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise GateError(
            f"{candidate} is not accurate enough: {problems[0]}{more}; export it at a higher "
            "precision"
        )
