"""Options that commands share, and JSON on stdout."""

from __future__ import annotations

import codecs
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wanx.builtin import BUILTIN, find_bundle
from wanx.commands.completion import complete_bundle, complete_provider
from wanx.config.bounds import MAX_THREADS
from wanx.hub.reference import hub_reference
from wanx.interruption import exit_on_sigint

if TYPE_CHECKING:
    from wanx.bundle.reader import Bundle

# Options can be set in the environment too; spelling each name out would drown the help.
option = partial(typer.Option, show_envvar=False)

Json = Annotated[bool, option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, option("--quiet", "-q", help="No progress on stderr.")]
Threads = Annotated[
    int | None,
    option(min=1, max=MAX_THREADS, help="Threads of the processor.", show_default="all cores"),
]
Provider = Annotated[
    str,
    option(
        help="Of ONNX Runtime: auto (the target's own, or what was measured to be faster and is "
        "installed), cpu, cuda, openvino, tensorrt-rtx, webgpu.",
        autocompletion=complete_provider,
    ),
]
Fallback = Annotated[
    bool, option("--fallback", help="Go on on the processor where the provider fails.")
]
CalibrationPrompts = Annotated[int, option(help="How many of them.")]
CalibrationSize = Annotated[str | None, option(help="Width x height.", show_default="small")]
CalibrationFrames = Annotated[int | None, option(help="Frames.", show_default="few")]
CalibrateCache = Annotated[
    bool,
    option("--calibrate-cache", help="Measure what skipping steps costs, for wanx run --speedup."),
]
BundlePath = Annotated[
    str,
    typer.Argument(
        metavar="BUNDLE",
        help="Folder of the bundle, owner/name of one on the Hugging Face hub, or the name of a "
        "built-in one.",
        autocompletion=complete_bundle,
    ),
]


def local_bundle(name: str, quiet: bool) -> str | Path:
    """Name of a bundle as it is, or its folder in the hub's cache, downloaded with progress.

    Raises:
        WanxError: as :func:`wanx.builtin.find_bundle`.
    """
    if hub_reference(name) is None or name in BUILTIN:
        return name
    from wanx.commands.display.generation import log_lines, progress_bars

    with exit_on_sigint(), progress_bars(quiet) as progress, log_lines(quiet, "wanx.hub"):
        return find_bundle(name, progress)


def print_json(value: Any) -> None:
    """Print a result for programs: in pure ASCII where standard output is not UTF-8."""
    utf8 = codecs.lookup(sys.stdout.encoding).name == "utf-8"
    print(json.dumps(value, indent=2, ensure_ascii=not utf8))


def bundle_facts(bundle: Bundle) -> dict[str, Any]:
    """Facts of a bundle for ``--json``."""
    return {"path": str(bundle.root), "hash": bundle.hash, "size_bytes": bundle.size_bytes}
