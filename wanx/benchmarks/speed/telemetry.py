"""Memory of another process over time, sampled from outside."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from wanx.benchmarks.speed.results import Memory

INTERVAL = 0.02  # seconds between two samples
MOST_VALUES = 240  # that are kept; a longer trial has longer intervals


class MemoryWatch:
    """Samples the memory of a process, and of the GPU where NVIDIA's library can tell."""

    def __init__(self) -> None:
        self._host: list[int] = []
        self._device: list[int] = []
        self._stop = threading.Event()

    @contextmanager
    def watching(self, pid: int) -> Iterator[None]:
        """Sample process ``pid`` while the block runs."""
        thread = threading.Thread(target=self._sample, args=(pid,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def memory(self) -> Memory:
        """The samples, the largest value of each interval."""
        count = max(len(self._host), len(self._device))
        width = max(1, -(-count // MOST_VALUES))
        return Memory(
            interval_seconds=INTERVAL * width,
            host_bytes=_largest(self._host, width),
            device_bytes=_largest(self._device, width),
        )

    def _sample(self, pid: int) -> None:
        statm = Path(f"/proc/{pid}/statm")
        with _device() as used:
            before = used()
            page = os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0
            while not self._stop.wait(INTERVAL):
                with suppress(OSError, IndexError, ValueError):
                    self._host.append(int(statm.read_text().split()[1]) * page)
                now = used()
                if now is not None and before is not None:
                    self._device.append(max(0, now - before))


def _largest(values: list[int], width: int) -> tuple[int, ...]:
    return tuple(max(values[i : i + width]) for i in range(0, len(values), width))


@contextmanager
def _device() -> Iterator[Any]:
    """Yield a function that gives the bytes in use on the first GPU, or None."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # neither the package nor the driver need be there
        yield lambda: None
        return
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        yield lambda: int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
    finally:
        pynvml.nvmlShutdown()
