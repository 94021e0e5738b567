"""Machine and versions that figures were measured with."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("onnxruntime", "numpy", "tokenizers", "pillow", "torch", "diffusers")


def environment(*packages: str) -> dict[str, str]:
    """Processor, memory, system, and the versions of Python and of the packages that compute.

    Args:
        packages: whose versions are wanted besides, where they are installed.
    """
    facts = {
        "cpu": f"{_processor()}, {os.cpu_count()} logical cores",
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    with suppress(AttributeError, OSError, ValueError):  # only POSIX tells
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        facts["memory"] = f"{memory / 2**30:.0f} GiB"
    for package in (*_PACKAGES, *packages):
        with suppress(PackageNotFoundError):
            facts[package] = version(package)
    return facts


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()
