"""From a checkpoint to a bundle: trace, store weights, publish."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType

import wanx
from wanx.errors import EnvironmentMismatchError

PACKAGES = ("torch", "onnx", "onnx_ir", "onnxscript", "ml_dtypes")


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


class _Package(ModuleType):
    """Importing this package puts it in the place of the function ``wanx.export``."""

    __call__ = staticmethod(wanx.export)


sys.modules[__name__].__class__ = _Package
