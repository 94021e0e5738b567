"""The command ``wanx bench``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from wanx.commands.completion import complete_bundle
from wanx.commands.options import Json, Provider, Quiet, Threads, local_bundle, option, print_json
from wanx.errors import GateError, UsageError, WanxError


def bench(
    bundles: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="BUNDLE",
            help="Folders of bundles, or built-in ones; with --compare: an old and a new "
            "report.json.",
            show_default="the built-in tiny model",
            autocompletion=complete_bundle,
        ),
    ] = None,
    output: Annotated[
        Path, option("--output", "-o", help="Folder for report.json, report.html and report.md.")
    ] = Path("report"),
    sizes: Annotated[
        str | None,
        option(help="Sizes to measure, such as 832x480,1280x720.", show_default="the bundle's own"),
    ] = None,
    frames: Annotated[int | None, option(help="Frames.", show_default="the bundle's own")] = None,
    steps: Annotated[
        int | None, option(help="Denoising steps.", show_default="the bundle's own")
    ] = None,
    guide_scale: Annotated[
        float | None, option(help="Weight of the prompt; 1 switches guidance off.")
    ] = None,
    prompt: Annotated[str | None, option(help="What the video shows.")] = None,
    image: Annotated[
        Path | None, option(help="First frame (i2v, flf2v).", show_default="made up")
    ] = None,
    repeat: Annotated[int, option(help="How often, each time in a process of its own.")] = 3,
    warm_up: Annotated[
        int | None,
        option(
            help="First steps of each run that do not count as a step.",
            show_default="1, and 3 on engines",
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        option(
            help="Bundle that the others are compared with.",
            show_default="the first",
            autocompletion=complete_bundle,
        ),
    ] = None,
    peer: Annotated[
        list[str] | None,
        option(
            metavar="<name>",
            help="Measure diffusers or diffusers-compiled too, on the weights of the first bundle; "
            "may be repeated.",
        ),
    ] = None,
    roofline: Annotated[
        bool,
        option(
            "--roofline/--no-roofline",
            help="Compare each part of the model with what this machine can do.",
        ),
    ] = True,
    profile: Annotated[
        bool, option("--profile", help="List the ten most expensive operations too.")
    ] = False,
    sweep: Annotated[
        str | None, option(help="tokens: how a step grows with the size; fits and predicts.")
    ] = None,
    compare: Annotated[
        bool, option("--compare", help="Compare two reports instead of measuring.")
    ] = False,
    fail_over: Annotated[
        str | None,
        option(help="With --compare: exit 3 if something is slower by more, such as 10%."),
    ] = None,
    provider: Provider = "auto",
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure how fast bundles are, stage by stage, and write a report.

    Every run is that of `wanx run`, in a process of its own; several bundles take turns.
    """
    if compare:
        _compare(bundles or [], fail_over, as_json)
        return
    if fail_over is not None:
        raise UsageError("--fail-over goes with --compare OLD NEW; measure first")
    if sweep not in (None, "tokens"):
        raise UsageError(f"--sweep {sweep} is not available; choose tokens")
    import wanx
    from wanx.benchmarks.speed.bench import Extras
    from wanx.benchmarks.speed.peers import parse_peers
    from wanx.benchmarks.speed.suite import BenchOptions
    from wanx.bundle.record import printable
    from wanx.commands.display.generation import progress_bars
    from wanx.commands.display.speed import print_results
    from wanx.commands.leftovers import find_leftovers
    from wanx.runtime.options import RunOptions
    from wanx.runtime.sizes import parse_size

    options = BenchOptions(
        run=RunOptions(prompt=prompt, steps=steps, guide_scale=guide_scale, image=image, seed=0),
        sizes=tuple(parse_size(size) for size in sizes.split(",")) if sizes else (),
        frames=frames, repeat=repeat, warm_up=warm_up, baseline=baseline,
        peers=parse_peers(peer or []), threads=threads, provider=provider,
    )  # fmt: skip
    extras = Extras(roofline=roofline or profile, profile=profile, sweep=sweep is not None)
    command = printable(shlex.join(["wanx", *sys.argv[1:]]))
    find_leftovers(output.parent, remove=True)
    local = [local_bundle(bundle, quiet) for bundle in bundles or ()]
    with progress_bars(quiet) as progress:
        results = wanx.bench(
            *local, output=output, options=options, extras=extras, command=command,
            progress=progress,
        )  # fmt: skip
    if as_json:
        print_json(results.to_json())
    else:
        print_results(results, output)
    if results.problems:
        raise WanxError(f"the report is incomplete: {results.problems[0]}")


def _compare(reports: list[str], fail_over: str | None, as_json: bool) -> None:
    from wanx.benchmarks.speed.change import changes, differences
    from wanx.benchmarks.speed.results import read_results
    from wanx.commands.display.speed import print_changes

    if len(reports) != 2:
        raise UsageError(f"--compare takes an old and a new report.json, not {len(reports)} files")
    limit = None if fail_over is None else _share(fail_over)
    old, new = (read_results(Path(path)) for path in reports)
    all_changes = changes(old, new)
    other_differences = differences(old, new)
    if as_json:
        print_json(
            {
                "differences": other_differences,
                "changes": [change.to_json() for change in all_changes],
            }
        )
    else:
        print_changes(all_changes, other_differences)
    slower = [change for change in all_changes if limit is not None and change.slower_than(limit)]
    if slower:
        worst = max(slower, key=lambda change: change.growth)
        raise GateError(
            f"{worst.metric} of {worst.subject} at {worst.case} is slower by "
            f"{worst.growth:.1%}, more than {fail_over} and than noise; {len(slower)} of "
            f"{len(all_changes)} figures are"
        )


def _share(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / 100
    except ValueError:
        value = -1.0
    if not (text.endswith("%") and 0 <= value < float("inf")):
        raise UsageError(f"--fail-over {text} is not a percentage; give one such as 10%")
    return value
