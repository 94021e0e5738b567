"""Progress of TensorRT's builder as a fraction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def progress_monitor(trt: Any, on_fraction: Callable[[float], None]) -> Any:
    """Make a ``trt.IProgressMonitor`` that reports how much of a build is done, from 0 to 1."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Adds up nested phases: each has its share of a step of the one around it."""

        def __init__(self) -> None:
            super().__init__()
            # By name: where it begins and how long it is, of the whole; its steps, and those done.
            self.phases: dict[str, tuple[float, float, int, int]] = {}
            self.reported = 0.0

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            start, length, count, done = self.phases.get(parent or "", (0.0, 1.0, 1, 0))
            share = length / count
            self.phases[name] = (start + share * min(done, count - 1), share, max(1, steps), 0)

        def step_complete(self, name: str, step: int) -> bool:
            start, length, count, _ = self.phases[name]
            done = min(count, step + 1)
            self.phases[name] = (start, length, count, done)
            whole = start + length * done / count
            if whole >= self.reported + 0.01:  # phases may end early and go back
                self.reported = whole
                on_fraction(whole)
            return True

        def phase_finish(self, name: str) -> None:
            self.phases.pop(name, None)

    return Monitor()
