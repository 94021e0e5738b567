"""GPU, driver and versions that figures were measured with."""

from __future__ import annotations

import subprocess
from contextlib import suppress

import torch

from wanx.benchmarks.report.environment import environment
from wanx.version import __version__

_PACKAGES = ("triton", "diffusers", "fa3-fwd", "nvidia-cudnn-frontend")


def machine(device: torch.device) -> dict[str, str | int]:
    """GPU, driver, processor, system and versions."""
    # torch's own version tells the CUDA that it was built for.
    facts: dict[str, str | int] = environment(*_PACKAGES) | {
        "wanx": __version__,
        "torch": str(torch.__version__),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "sm": 10 * properties.major + properties.minor,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
            "driver": _driver(),
        }
    return facts


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.split("\n")[0].strip()
    return "unknown"
