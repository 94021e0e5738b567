"""Options that commands share, and JSON on stdout."""

from __future__ import annotations

import codecs
import json
import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wanx.commands.completion import complete_bundle, complete_provider
from wanx.config.bounds import MAX_THREADS

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
BundlePath = Annotated[
    str,
    typer.Argument(
        metavar="BUNDLE",
        help="Folder of the bundle, or the name of a built-in one.",
        autocompletion=complete_bundle,
    ),
]


def print_json(value: Any) -> None:
    """Print a result for programs: in pure ASCII where standard output is not UTF-8."""
    utf8 = codecs.lookup(sys.stdout.encoding).name == "utf-8"
    print(json.dumps(value, indent=2, ensure_ascii=not utf8))


def bundle_facts(bundle: Bundle) -> dict[str, Any]:
    """Facts of a bundle for ``--json``."""
    return {"path": str(bundle.root), "hash": bundle.hash, "size_bytes": bundle.size_bytes}
