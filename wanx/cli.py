"""The command line: parse, call the library, render.

Results go to stdout, progress and errors to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from wanx.errors import UsageError, WanxError

if TYPE_CHECKING:
    from wanx.bundle import Bundle


class _Group(TyperGroup):
    """Turns what wanx raises into one line and an exit code."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except WanxError as error:
            if os.environ.get("WANX_DEBUG"):
                raise
            _say(f"error: {error}")
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            _say("interrupted: nothing partial was left behind")
            sys.exit(130)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)


app = typer.Typer(
    cls=_Group,
    help="Deployment compiler for the Wan2.1 video models: export a checkpoint, run the bundle.",
    epilog="Options can come from the environment: WANX_RUN_STEPS=20 is run --steps 20. "
    "WANX_DEBUG=1 shows tracebacks.",
    context_settings={"auto_envvar_prefix": "WANX", "help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# Options can be set in the environment too; spelling each name out would drown the help.
_option = partial(typer.Option, show_envvar=False)

Json = Annotated[bool, _option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, _option("--quiet", "-q", help="No progress on stderr.")]
Threads = Annotated[
    int | None, _option(min=1, help="Threads of the processor.", show_default="all cores")
]
BundlePath = Annotated[str, typer.Argument(metavar="BUNDLE", help="Folder of the bundle, or tiny.")]


def main() -> None:
    """Run the command line; the entry point of ``wanx``."""
    app(prog_name="wanx")


def _version(show: bool) -> None:
    if show:
        import wanx

        typer.echo(f"wanx {wanx.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, _option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(help="Folder of a checkpoint or bundle, or tiny, the built-in model.")
    ] = "tiny",
    output: Annotated[
        Path | None, _option("--output", "-o", help="Folder of the bundle to write.")
    ] = None,
    precision: Annotated[
        str,
        _option(help="Storage of DiT and text encoder: auto (as they are), fp32, bf16, fp16."),
    ] = "auto",
    target: Annotated[str, _option(help="What will run the bundle: cpu.")] = "cpu",
    task: Annotated[
        str | None, _option(help="Insist on this task; an error names what was found.")
    ] = None,
    force: Annotated[bool, _option("--force", help="Replace a bundle that exists.")] = False,
    dry_run: Annotated[
        bool, _option("--dry-run", help="Check the source and print what it would take.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Export a checkpoint to a bundle."""
    from wanx.export import require_packages

    require_packages()
    from wanx.export.exporter import export as run_export
    from wanx.export.exporter import plan
    from wanx.export.options import ExportOptions
    from wanx.rendering import bars, print_bundle, print_estimate

    options = ExportOptions(
        source=source, output=output, precision=precision, target=target,
        task=task,  # type: ignore[arg-type]
        force=force,
    )  # fmt: skip
    if dry_run:
        resolved, needs = plan(options)
        if as_json:
            _print_json(
                {"name": resolved.checkpoint.config.name, "precision": resolved.precision}
                | {"output": str(resolved.output)}
                | asdict(needs)
            )
        else:
            print_estimate(resolved, needs)
        return
    with bars(quiet) as progress:
        bundle = run_export(options, progress)
    if as_json:
        _print_json(_bundle_facts(bundle))
    else:
        print_bundle(bundle)


@app.command()
def run(
    bundle: Annotated[
        str | None, typer.Argument(help="Folder of the bundle; left out, the built-in tiny model.")
    ] = None,
    prompt: Annotated[str | None, typer.Argument(help="What the video shows.")] = None,
    output: Annotated[
        Path | None,
        _option(
            "--output",
            "-o",
            help="File to write: .mp4, .webm, .gif, or .png for one frame.",
            show_default="out.mp4, numbered if taken",
        ),
    ] = None,
    size: Annotated[str | None, _option(help="Width x height, such as 832x480.")] = None,
    frames: Annotated[int | None, _option(help="Frames: a multiple of 4, plus 1.")] = None,
    steps: Annotated[int | None, _option(help="Denoising steps.")] = None,
    guide_scale: Annotated[
        float | None, _option(help="Weight of the prompt; 1 switches guidance off.")
    ] = None,
    shift: Annotated[float | None, _option(help="Shift of the noise schedule.")] = None,
    solver: Annotated[str, _option(help="unipc or dpm++.")] = "unipc",
    seed: Annotated[int, _option(help="Seed of the noise; -1 draws one.")] = -1,
    negative_prompt: Annotated[str | None, _option(help="What the video should not show.")] = None,
    fps: Annotated[int | None, _option(help="Frames per second of the file.")] = None,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Generate a video from a prompt.

    Options that are left out take the bundle's defaults.
    """
    import wanx
    from wanx.rendering import bars, print_generation
    from wanx.runtime.options import RunOptions

    folder, text = _bundle_and_prompt(bundle, prompt)
    width, height = _parse_size(size)
    options = RunOptions(
        prompt=text, negative_prompt=negative_prompt, width=width, height=height, frames=frames,
        fps=fps, steps=steps, guide_scale=guide_scale, shift=shift, solver=solver, seed=seed,
    )  # fmt: skip
    with bars(quiet) as progress:
        pipeline = wanx.load(folder, threads=threads)
        result = pipeline.run(
            options, output=output or _free_name(Path("out.mp4")), progress=progress
        )
    if as_json:
        _print_json(
            {"output": str(result.path), "bundle": pipeline.bundle.hash}
            | {"options": asdict(result.options), "stages": [asdict(s) for s in result.stages]}
        )
    else:
        print_generation(result, pipeline.bundle)


@app.command()
def inspect(bundle: BundlePath, as_json: Json = False) -> None:
    """Show what a bundle holds."""
    from wanx.bundle import read_bundle
    from wanx.rendering import print_bundle

    found = read_bundle(_folder(bundle))
    if as_json:
        _print_json(_bundle_facts(found) | found.manifest.model_dump(mode="json"))
    else:
        print_bundle(found)


@app.command()
def verify(bundle: BundlePath, as_json: Json = False, quiet: Quiet = False) -> None:
    """Hash every file of a bundle and report the damaged ones; exit 5 if there are any."""
    from wanx.bundle import read_bundle, verify_bundle
    from wanx.progress import byte_counter
    from wanx.rendering import bars, print_checks

    folder = _folder(bundle)
    total = read_bundle(folder).size_bytes
    with bars(quiet) as progress:
        checks = verify_bundle(
            folder,
            on_bytes=byte_counter(progress, "verify", total),
            allow_hard_links=bundle == "tiny",
        )
    if as_json:
        _print_json({"files": [asdict(check) for check in checks]})
    else:
        print_checks(checks)
    if any(check.problem for check in checks):
        raise typer.Exit(5)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine can run and export; exit 4 if it cannot run a bundle."""
    from wanx.doctor import examine
    from wanx.rendering import print_findings

    findings = examine()
    if as_json:
        _print_json([asdict(finding) for finding in findings])
    else:
        print_findings(findings)
    if any(finding.required and not finding.ok for finding in findings):
        raise typer.Exit(4)


def _bundle_and_prompt(first: str | None, second: str | None) -> tuple[Path | None, str | None]:
    """Tell a bundle from a prompt when only one of the two was given."""
    if first is None:
        return None, None
    if second is not None:
        return (None if first == "tiny" else Path(first)), second
    if first == "tiny":
        return None, None
    if Path(first).is_dir():
        return Path(first), None
    if " " not in first.strip() or first.startswith((".", "/", "~")):
        raise UsageError(
            f"{first!r} is neither a bundle nor a prompt of several words; "
            "for the built-in model and a short prompt write: wanx run tiny PROMPT"
        )
    return None, first


def _folder(bundle: str) -> Path:
    from wanx.builtin import builtin_bundle

    return builtin_bundle() if bundle == "tiny" else Path(bundle)


def _parse_size(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    width, _, height = text.lower().replace("*", "x").replace("×", "x").partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise UsageError(f"--size {text} is not a size; write WIDTHxHEIGHT, such as 832x480")
    return int(width), int(height)


def _free_name(path: Path) -> Path:
    number = 0
    candidate = path
    while os.path.lexists(candidate):
        number += 1
        candidate = path.with_stem(f"{path.stem}-{number}")
    return candidate


def _bundle_facts(bundle: Bundle) -> dict[str, Any]:
    return {"path": str(bundle.root), "hash": bundle.hash, "size_bytes": bundle.size_bytes}


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _say(text: str) -> None:
    typer.echo(text.encode(errors="backslashreplace").decode(), err=True)
