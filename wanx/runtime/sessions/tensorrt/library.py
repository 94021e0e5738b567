"""Import of TensorRT's Python module such that its ONNX parser finds plug-ins."""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from wanx.errors import EnvironmentMismatchError
from wanx.files.cache import cache_path

PACKAGES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx-cu13"}
MODULES = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}  # by target
RTX_SMS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")  # that TensorRT-RTX builds for
_LIBRARY = "libtensorrt_rtx.so"
_named: set[Path] = set()  # folders of libraries that this process has loaded by the right name
_FILES = (f"{_LIBRARY}.1", "libtensorrt_onnxparser_rtx.so.1")


@cache
def import_tensorrt(name: str, *, parses: bool = True) -> Any:
    """Import ``tensorrt`` or ``tensorrt_rtx``.

    Args:
        name: of the module.
        parses: whether its parser is going to be used.

    Raises:
        EnvironmentMismatchError: it is not installed, or was imported elsewhere before, where its
            parser would end the process.
    """
    if importlib.util.find_spec(name) is None:
        raise EnvironmentMismatchError(
            f"{name} is not installed; pip install {PACKAGES[name]} installs it"
        )
    imported = name in sys.modules
    if name == "tensorrt_rtx" and sys.platform == "linux" and (parses or not imported):
        _name_library(imported=imported)
    return importlib.import_module(name)


def _name_library(*, imported: bool) -> None:
    """Let the parser of TensorRT for RTX find its library under the name that it looks for.

    At the first plug-in the parser opens ``libtensorrt_rtx.so``, of which the wheel has only
    ``.so.1``, and aborts the process where that fails. It looks in the folder that it was loaded
    from itself. So both are loaded first, from a folder of links one of which has that name; the
    module then finds them loaded.
    """
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    if spec is None or spec.origin is None:
        return  # installed by other means, with libraries in folders of the system
    folder = Path(spec.origin).parent
    if (folder / _LIBRARY).exists() or not all((folder / file).exists() for file in _FILES):
        return
    if folder in _named:
        return
    if imported:
        try:
            ctypes.CDLL(_LIBRARY)
        except OSError:
            raise EnvironmentMismatchError(
                "tensorrt_rtx was imported before wanx could make its library known to the "
                f"parser; import it later, or link {_LIBRARY} to {folder / _FILES[0]} in a folder "
                "of LD_LIBRARY_PATH"
            ) from None
        return
    links = _links(folder)
    for file in _FILES:
        ctypes.CDLL(str(links / file))
    _named.add(folder)


def _links(folder: Path) -> Path:
    """Make a folder of links to the libraries: in the user's cache, or a temporary one."""
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    links = cache_path("tensorrt", digest)
    try:
        if links is not None:
            return _linked(folder, links)
    except OSError:
        pass
    temporary = tempfile.mkdtemp(prefix="wanx-tensorrt-")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return _linked(folder, Path(temporary))


def _linked(folder: Path, links: Path) -> Path:
    links.mkdir(parents=True, exist_ok=True)
    for name, file in ((_LIBRARY, _FILES[0]), *((file, file) for file in _FILES)):
        if not (links / name).exists():
            # Another process may do the same now.
            fresh = links / f"{name}.{os.getpid()}"
            fresh.symlink_to(folder / file)
            fresh.replace(links / name)
    return links
