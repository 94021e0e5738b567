"""Command line: assembles the commands, and turns errors into one line and an exit code.

Results go to stdout, progress and errors to stderr.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from wanx.commands.bench import bench
from wanx.commands.build import build
from wanx.commands.compare import compare
from wanx.commands.display.streams import lossless_streams
from wanx.commands.doctor import doctor
from wanx.commands.export import export
from wanx.commands.inspect import inspect
from wanx.commands.options import option
from wanx.commands.run import run
from wanx.commands.verify import verify
from wanx.errors import CancelledError, WanxError
from wanx.interruption import INTERRUPTED, exit_code, interrupt_on_signals
from wanx.version import __version__

# Typer has no other name for the class of what its parser raises.
_ParserError: type[Any] = typer.BadParameter.__mro__[2]


class _Group(TyperGroup):
    """Turns what wanx raises into one line and an exit code."""

    def get_params(self, ctx: typer.Context) -> list[Any]:  # type: ignore[override]
        """Keep the environment out of these options, since each replaces the command."""
        params = super().get_params(ctx)
        for param in params:
            param.allow_from_autoenv = False  # type: ignore[attr-defined]
        return params

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Parse the arguments and run the command, with the parser's errors in one line."""
        try:
            code = super().main(*args, **kwargs | {"standalone_mode": False})
        except _ParserError as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()  # the help
            else:
                _say(f"error: {_one_line(error)}")
            sys.exit(error.exit_code)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run the command."""
        try:
            return super().invoke(ctx)
        except WanxError as error:
            if os.environ.get("WANX_DEBUG"):
                raise
            _say(f"error: {error}")
            sys.exit(exit_code() if isinstance(error, CancelledError) else error.exit_code)
        except KeyboardInterrupt:
            _say(INTERRUPTED)
            sys.exit(exit_code())


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

for command in (export, build, run, compare, bench, inspect, verify, doctor):
    app.command()(command)


def main() -> None:
    """Run the command line; the entry point of ``wanx``."""
    with lossless_streams(), interrupt_on_signals():
        app(prog_name="wanx")


def _version(show: bool) -> None:
    if show:
        print(f"wanx {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _one_line(error: Any) -> str:
    """Say what the parser refuses, the value, and where to read what is accepted."""
    text = " ".join(str(error.format_message()).split()).rstrip(".")
    details = getattr(error.__cause__, "errors", None)
    if details is not None:  # of pydantic, whose messages leave the value out
        text = f"{text} (found {details()[0]['input']!r:.60})"
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    command = error.ctx.command_path if getattr(error, "ctx", None) else "wanx"
    return f"{text[:1].lower()}{text[1:]}; see {command} --help"


def _say(text: str) -> None:
    print(text, file=sys.stderr)
