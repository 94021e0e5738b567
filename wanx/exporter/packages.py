"""Packages that an export needs beyond those of the runtime."""

from __future__ import annotations

from importlib.util import find_spec

from wanx.errors import EnvironmentMismatchError

PACKAGES = ("torch", "onnx", "onnx_ir", "onnxscript")


def require_packages() -> None:
    """Check that what an export needs beyond the runtime is installed.

    Raises:
        EnvironmentMismatchError: packages are missing.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise EnvironmentMismatchError(
            f"an export needs {', '.join(missing)}, which this environment lacks: "
            "pip install 'wanx[export]'"
        )
