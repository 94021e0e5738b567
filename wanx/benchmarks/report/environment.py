"""What figures were measured with: machine and versions."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_TOOLS = ("onnxruntime", "numpy", "tokenizers", "pillow", "torch", "diffusers")


def environment() -> dict[str, str]:
    """Processor, memory, system, and the versions of Python and of the packages that compute."""
    found = {
        "cpu": f"{_processor()}, {os.cpu_count()} logical cores",
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    with suppress(AttributeError, OSError, ValueError):  # only POSIX tells
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        found["memory"] = f"{memory / 2**30:.0f} GiB"
    for tool in _TOOLS:
        with suppress(PackageNotFoundError):
            found[tool] = version(tool)
    return found


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()
