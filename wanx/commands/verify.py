"""Command ``wanx verify``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from wanx.commands.options import BundlePath, Json, Quiet, Threads, local_bundle, option, print_json
from wanx.errors import CorruptInputError


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
    import wanx
    from wanx.commands.display.accuracy import print_golden
    from wanx.commands.display.generation import print_checks, progress_bars

    local = local_bundle(bundle, quiet)
    with progress_bars(quiet) as progress:
        verification = wanx.verify(local, golden=golden, threads=threads, progress=progress)
    if as_json:
        print_json(
            {"files": [asdict(check) for check in verification.files]}
            | {"golden_steps": [asdict(step) for step in verification.golden_steps]}
            | {"text_error": verification.text_error and str(verification.text_error)}
        )
    else:
        print_checks(verification.files)
        print_golden(verification.golden_steps)
    if not verification.intact:
        raise typer.Exit(CorruptInputError.exit_code)
    verification.require_accuracy()
