"""Weights that do not stay on the GPU: copied there just before they are read, beside computing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from wanx.runtime.sessions.device.cuda import Cuda, CudaError

SLOTS = 2


@dataclass(frozen=True)
class _Slot:
    """Memory of the GPU, and marks set when it was filled and when it was read."""

    address: int
    filled: Any
    read: Any


class WeightRing:
    """Weights of steps that are equally large pass through two pieces of the GPU's memory.

    Copies run in a stream of their own, two steps ahead. A copy waits until its slot was read, a
    step until its slot was filled; nothing waits on the host. After the last step come the first
    ones again, so that the next run finds them there.
    """

    def __init__(self, cuda: Cuda, size: int, sources: Sequence[int]) -> None:
        """Take the memory; copies start with :meth:`restart`.

        Args:
            cuda: the GPU; steps run in its stream.
            size: bytes of the weights of one step.
            sources: their pinned memory, in the order of the steps.

        Raises:
            CudaError: CUDA refuses.
        """
        self._cuda = cuda
        self._size = size
        self._sources = sources
        self._turn = 0
        self._addresses: list[int] = []
        self._marks: list[Any] = []
        self._stream = cuda.open_stream()
        try:
            for _ in range(SLOTS):
                self._addresses.append(cuda.allocate(size))
                self._marks += [cuda.event(), cuda.event()]
        except BaseException:
            self.close()
            raise
        pairs = zip(self._marks[::2], self._marks[1::2], strict=True)
        self._slots = [_Slot(a, *pair) for a, pair in zip(self._addresses, pairs, strict=True)]

    def restart(self) -> None:
        """Begin with the first step, whatever became of the last run."""
        self._cuda.wait()
        self._turn = 0
        for turn in range(SLOTS):
            self._fill(turn)

    def take(self) -> int:
        """The address of the next weights; what is queued from now on waits for them."""
        slot = self._slots[self._turn % SLOTS]
        self._cuda.hold(slot.filled)
        return slot.address

    def give_back(self) -> None:
        """Let the slot be filled again once what was queued until now has read it."""
        self._cuda.mark(self._slots[self._turn % SLOTS].read)
        self._fill(self._turn + SLOTS)
        self._turn += 1

    def close(self) -> None:
        """Free the memory when its copies are done."""
        with suppress(CudaError):
            self._cuda.wait(self._stream)
        for address in self._addresses:
            self._cuda.free(address)
        for mark in self._marks:
            self._cuda.close_event(mark)
        self._cuda.close_stream(self._stream)

    def _fill(self, turn: int) -> None:
        slot = self._slots[turn % SLOTS]
        source = self._sources[turn % len(self._sources)]
        self._cuda.hold(slot.read, self._stream)
        self._cuda.to_device(slot.address, source, self._size, self._stream)
        self._cuda.mark(slot.filled, self._stream)
