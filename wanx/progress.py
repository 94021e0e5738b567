"""Protocol of progress callbacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

Unit = Literal["bytes", "steps"]


class Progress(Protocol):
    """Called with the work done so far; ``done == total`` ends a stage."""

    def __call__(self, stage: str, done: int, total: int, unit: Unit) -> None:
        """Record that ``done`` of ``total`` units of ``stage`` are finished."""


def no_progress(stage: str, done: int, total: int, unit: Unit) -> None:
    """Report to nobody."""


def step_counter(progress: Progress, stage: str, total: int) -> Callable[[], None]:
    """Begin a stage of ``total`` steps, or some more, and return what counts one of them."""
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        progress(stage, min(done, total), total, "steps")

    progress(stage, 0, total, "steps")
    return count


def byte_counter(progress: Progress, stage: str, total: int) -> Callable[[int], None]:
    """Adapt a progress function to portions of bytes."""
    done = 0

    def count(portion: int) -> None:
        nonlocal done
        done += portion
        progress(stage, done, total, "bytes")

    return count
