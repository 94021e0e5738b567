"""Ceilings of the GPU for reports of bundles."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from wanx.benchmarks.gpu.bench import Bench
from wanx.benchmarks.gpu.ceilings import BF16, COPY, FP8, INT8, ceilings

_TYPES = {BF16: "high", FP8: "fp8", INT8: "int8"}


def device_rates(bench: Bench | None = None) -> tuple[dict[str, float], float] | None:
    """Operations per second by type, and bytes per second of a copy; None without a GPU.

    Args:
        bench: measured instead of the first GPU.
    """
    if bench is None:
        if not torch.cuda.is_available():
            return None
        bench = Bench(device=torch.device("cuda"), folder=Path(tempfile.gettempdir()))
    for _ in ceilings(bench):
        pass
    flops = {kind: bench.ceilings[name] for name, kind in _TYPES.items() if name in bench.ceilings}
    if "high" not in flops or COPY not in bench.ceilings:
        return None
    return flops, bench.ceilings[COPY]
