"""Progress in plain lines, for a log or a pipe; amounts of bytes and of time."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from wanx.bundle.record import printable
from wanx.progress import Progress, Unit

_SECONDS_BETWEEN_LINES = 30.0


def format_bytes(count: float) -> str:
    """``count`` bytes in decimal units, with three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def format_seconds(seconds: float) -> str:
    """``seconds`` as a person would say it."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@dataclass
class _Stage:
    started: float
    done: int
    total: int
    unit: Unit
    moved: bool = False


@contextmanager
def progress_lines(seconds_between: float = _SECONDS_BETWEEN_LINES) -> Iterator[Progress]:
    """Yield a progress function that writes a line to stderr when a stage begins.

    A thread repeats how far the stages are, even while a single step takes long.

    Args:
        seconds_between: Seconds from one such repetition to the next.
    """
    stages: dict[str, _Stage] = {}
    lock, ended = threading.Lock(), threading.Event()

    def report(stage: str, done: int, total: int, unit: Unit) -> None:
        with lock:
            if stage in stages and done < stages[stage].done:
                del stages[stage]  # another round of it begins
            if stage not in stages:
                text = f"{printable(stage)}: {_amount(done, unit)} of {_amount(total, unit)}"
                print(text, file=sys.stderr, flush=True)
                stages[stage] = _Stage(time.monotonic(), done, total, unit)
            stages[stage].done, stages[stage].total, stages[stage].moved = done, total, True

    def repeat() -> None:
        while not ended.wait(seconds_between):
            with lock:
                latest = next(reversed(stages), None)
                for name, stage in stages.items():
                    # What stands still while a later stage has begun has failed, or waits for it.
                    if stage.done < stage.total and (stage.moved or name == latest):
                        print(f"{printable(name)}: {_how_far(stage)}", file=sys.stderr, flush=True)
                    stage.moved = False

    thread = threading.Thread(target=repeat, name="progress", daemon=True)
    thread.start()
    try:
        yield report
    finally:
        ended.set()
        thread.join()


def _amount(count: int, unit: Unit) -> str:
    return format_bytes(count) if unit == "bytes" else str(count)


def _how_far(stage: _Stage) -> str:
    seconds = time.monotonic() - stage.started
    done = _amount(stage.done, stage.unit)
    left = seconds * (stage.total - stage.done) / stage.done if stage.done else None
    return f"{done} of {_amount(stage.total, stage.unit)}, {format_seconds(seconds)} so far" + (
        "" if left is None else f", {format_seconds(left)} left"
    )
