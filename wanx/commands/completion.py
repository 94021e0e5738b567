"""Values that the shell offers for arguments and options.

A shell asks at every press of the tab key, so nothing here may import PyTorch; what has to be
imported to know the values is imported while completing.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from wanx.builtin import BUILTIN
from wanx.config.models import Task


def complete_bundle(incomplete: str) -> list[str]:
    """List the built-in bundles and those in the folder that is being typed."""
    folder, slash, start = incomplete.rpartition("/")
    try:
        manifests = sorted(Path(folder + slash or ".").glob("*/manifest.json"))
    except OSError:  # a folder that may not be read
        manifests = []
    names = [path.parent.name for path in manifests if path.parent.name.startswith(start)]
    builtin = [name for name in BUILTIN if name.startswith(incomplete)]
    return builtin + [folder + slash + name for name in names]


def complete_precision(incomplete: str) -> list[str]:
    """List the precisions that a bundle may have, and ``auto``."""
    from wanx.config.number_formats import PRECISIONS

    return _starting_with(incomplete, ("auto", *(row.name for row in PRECISIONS)))


def complete_provider(incomplete: str) -> list[str]:
    """Complete an execution provider of ONNX Runtime."""
    from wanx.runtime.sessions.onnxruntime.providers import AUTO, PROVIDERS

    return _starting_with(incomplete, (AUTO, *PROVIDERS))


def complete_solver(incomplete: str) -> list[str]:
    """List the solvers."""
    from wanx.runtime.sampling.solvers import SOLVERS

    return _starting_with(incomplete, tuple(SOLVERS))


def complete_preset(incomplete: str) -> list[str]:
    """List the presets of runs."""
    from wanx.config.presets import RUN_PRESETS

    return _starting_with(incomplete, (*RUN_PRESETS, "none"))


def complete_target(incomplete: str) -> list[str]:
    """List the targets, without the GPUs that may follow them."""
    from wanx.runtime.sessions.registry import BACKENDS

    return _starting_with(incomplete, tuple(BACKENDS))


def complete_task(incomplete: str) -> list[str]:
    """List the tasks of the models."""
    return _starting_with(incomplete, get_args(Task))


def _starting_with(incomplete: str, values: tuple[str, ...]) -> list[str]:
    return [value for value in values if value.startswith(incomplete)]
