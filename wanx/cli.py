"""The command line: parse, call the library, render.

Results go to stdout, progress and errors to stderr.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from wanx import cli_run
from wanx.builtin import find_bundle, is_builtin
from wanx.cli_options import BundlePath, Json, Quiet, option, print_json
from wanx.errors import WanxError

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

app.command()(cli_run.run)


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
def export(
    source: Annotated[
        str, typer.Argument(help="Folder of a checkpoint or bundle, or tiny, the built-in model.")
    ] = "tiny",
    output: Annotated[
        Path | None, option("--output", "-o", help="Folder of the bundle to write.")
    ] = None,
    precision: Annotated[
        str,
        option(help="Storage of DiT and text encoder: auto (as they are), fp32, bf16, fp16."),
    ] = "auto",
    target: Annotated[str, option(help="What will run the bundle: cpu.")] = "cpu",
    task: Annotated[
        str | None, option(help="Insist on this task; an error names what was found.")
    ] = None,
    force: Annotated[bool, option("--force", help="Replace a bundle that exists.")] = False,
    dry_run: Annotated[
        bool, option("--dry-run", help="Check the source and print what it would take.")
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
            print_json(
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
        print_json(_bundle_facts(bundle))
    else:
        print_bundle(bundle)


@app.command()
def inspect(bundle: BundlePath, as_json: Json = False) -> None:
    """Show what a bundle holds."""
    from wanx.bundle import read_bundle
    from wanx.rendering import print_bundle

    found = read_bundle(find_bundle(bundle))
    if as_json:
        print_json(_bundle_facts(found) | found.manifest.model_dump(mode="json"))
    else:
        print_bundle(found)


@app.command()
def verify(bundle: BundlePath, as_json: Json = False, quiet: Quiet = False) -> None:
    """Hash every file of a bundle and report the damaged ones; exit 5 if there are any."""
    from wanx.bundle import read_bundle, verify_bundle
    from wanx.progress import byte_counter
    from wanx.rendering import bars, print_checks

    folder = find_bundle(bundle)
    total = read_bundle(folder).size_bytes
    with bars(quiet) as progress:
        checks = verify_bundle(
            folder,
            on_bytes=byte_counter(progress, "verify", total),
            allow_hard_links=is_builtin(folder),
        )
    if as_json:
        print_json({"files": [asdict(check) for check in checks]})
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
        print_json([asdict(finding) for finding in findings])
    else:
        print_findings(findings)
    if any(finding.required and not finding.ok for finding in findings):
        raise typer.Exit(4)


def _bundle_facts(bundle: Bundle) -> dict[str, Any]:
    return {"path": str(bundle.root), "hash": bundle.hash, "size_bytes": bundle.size_bytes}


def _say(text: str) -> None:
    typer.echo(text.encode(errors="backslashreplace").decode(), err=True)
