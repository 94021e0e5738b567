"""The command line: parse, call the library, render.

Results go to stdout, progress and errors to stderr.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from wanx.builtin import find_bundle, is_builtin
from wanx.commands import bench, build, compare, export, run
from wanx.commands.options import BundlePath, Json, Quiet, Threads, bundle_facts, option, print_json
from wanx.errors import WanxError
from wanx.interruption import EXIT_CODE, INTERRUPTED

if TYPE_CHECKING:
    from wanx.benchmarks.accuracy.comparison import Agreement


class _Group(TyperGroup):
    """Turns what wanx raises into one line and an exit code."""

    def get_params(self, ctx: typer.Context) -> list[Any]:  # type: ignore[override]
        """Keep the environment out of these options, since each replaces the command."""
        params = super().get_params(ctx)
        for param in params:
            param.allow_from_autoenv = False  # type: ignore[attr-defined]
        return params

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
            _say(INTERRUPTED)
            sys.exit(EXIT_CODE)
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
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.command()(export.export)
app.command()(build.build)
app.command()(run.run)
app.command()(compare.compare)
app.command()(bench.bench)


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
        bool, option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def inspect(bundle: BundlePath, as_json: Json = False) -> None:
    """Show what a bundle holds."""
    from wanx.bundle.reader import read_bundle
    from wanx.commands.display.generation import print_bundle

    found = read_bundle(find_bundle(bundle))
    if as_json:
        print_json(bundle_facts(found) | found.manifest.model_dump(mode="json"))
    else:
        print_bundle(found)


@app.command()
def verify(
    bundle: BundlePath,
    golden: Annotated[
        bool, option(help="Run the golden steps too, which loads the denoiser.")
    ] = True,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Hash every file of a bundle and run its golden steps.

    Exit 5 if a file is damaged, 3 if a step is not accurate enough.
    """
    from wanx.accuracy.golden_check import check_golden, require_golden
    from wanx.benchmarks.accuracy.comparison import Gates
    from wanx.bundle.reader import read_bundle, verify_bundle
    from wanx.commands.display.accuracy import print_golden
    from wanx.commands.display.generation import bars, print_checks
    from wanx.progress import byte_counter

    folder = find_bundle(bundle)
    total = read_bundle(folder).size_bytes
    with bars(quiet) as progress:
        checks = verify_bundle(
            folder,
            on_bytes=byte_counter(progress, "verify", total),
            allow_hard_links=is_builtin(folder),
        )
        sound = not any(check.problem for check in checks)
        steps: tuple[Agreement, ...] = ()
        if golden and sound:
            steps = check_golden(read_bundle(folder), threads=threads, progress=progress)
    if as_json:
        print_json(
            {"files": [asdict(check) for check in checks]}
            | {"golden_steps": [asdict(step) for step in steps]}
        )
    else:
        print_checks(checks)
        print_golden(steps)
    if not sound:
        raise typer.Exit(5)
    require_golden(steps, Gates())


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine can run and export; exit 4 if it cannot run a bundle."""
    from wanx.commands.display.generation import print_findings
    from wanx.commands.doctor import examine

    findings = examine()
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        print_findings(findings)
    if any(finding.required and not finding.ok for finding in findings):
        raise typer.Exit(4)


def _say(text: str) -> None:
    typer.echo(text.encode(errors="backslashreplace").decode(), err=True)
