"""Times of an engine's layers, by TensorRT's profiler."""

from __future__ import annotations

from collections import defaultdict
from typing import Any


def layer_times(trt: Any) -> Any:
    """Make a ``trt.IProfiler`` that keeps the seconds of each run of a layer, by its name."""

    class LayerTimes(trt.IProfiler):  # type: ignore[misc]
        """Receives the time of every layer after each run."""

        def __init__(self) -> None:
            super().__init__()
            self.seconds: dict[str, list[float]] = defaultdict(list)

        def report_layer_time(self, name: str, ms: float) -> None:
            self.seconds[name].append(ms / 1000)

    return LayerTimes()
