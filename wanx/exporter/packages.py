"""Packages that an export needs beyond those of the runtime."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from wanx.errors import EnvironmentMismatchError

GRAPHS = ("onnx", "onnx_ir")  # to write a graph
PACKAGES = ("torch", *GRAPHS, "onnxscript")  # to trace, to quantise, to record golden steps


def missing_packages(packages: Sequence[str] = PACKAGES) -> list[str]:
    """List the packages that are not installed."""
    return [name for name in packages if find_spec(name) is None]


def require_packages(purpose: str, packages: Sequence[str] = PACKAGES) -> None:
    """Check that what an export needs beyond the runtime is installed.

    Args:
        purpose: of the packages, for the error, such as ``trace dit``.
        packages: that it takes.

    Raises:
        EnvironmentMismatchError: packages are missing.
    """
    if missing := missing_packages(packages):
        light = " (or 'wanx[export-light]', without PyTorch)" if packages == GRAPHS else ""
        raise EnvironmentMismatchError(
            f"to {purpose} takes {', '.join(missing)}, which this environment lacks: "
            f"pip install 'wanx[export]'{light}"
        )
