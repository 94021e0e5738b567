"""Ring buffer of weights on the GPU, filled from pinned memory while steps compute."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from wanx.runtime.sessions.device.cuda import Cuda, CudaError

SLOTS = 2


@dataclass(frozen=True)
class _Slot:
    """Memory of the GPU, and events: filled (ready), and read by its step (free)."""

    address: int
    ready_event: Any
    free_event: Any


class WeightRing:
    """Two slots of GPU memory through which equally large weights of steps pass.

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
        self._events: list[Any] = []
        self._stream = cuda.open_stream()
        try:
            for _ in range(SLOTS):
                self._addresses.append(cuda.allocate(size))
                self._events += [cuda.create_event(), cuda.create_event()]
        except BaseException:
            self.close()
            raise
        pairs = zip(self._events[::2], self._events[1::2], strict=True)
        self._slots = [_Slot(a, *pair) for a, pair in zip(self._addresses, pairs, strict=True)]

    def restart(self) -> None:
        """Begin with the first step, whatever became of the last run."""
        self._cuda.synchronize()
        self._turn = 0
        for turn in range(SLOTS):
            self._fill(turn)

    def acquire(self) -> int:
        """Return the address of the next weights; what is queued from now on waits for them."""
        slot = self._slots[self._turn % SLOTS]
        self._cuda.wait_event(slot.ready_event)
        return slot.address

    def release(self) -> None:
        """Refill the slot once what was queued until now has read it."""
        self._cuda.record_event(self._slots[self._turn % SLOTS].free_event)
        self._fill(self._turn + SLOTS)
        self._turn += 1

    def close(self) -> None:
        """Free the memory when its copies are done."""
        with suppress(CudaError):
            self._cuda.synchronize(self._stream)
        for address in self._addresses:
            self._cuda.free(address)
        for event in self._events:
            self._cuda.close_event(event)
        self._cuda.close_stream(self._stream)

    def _fill(self, turn: int) -> None:
        slot = self._slots[turn % SLOTS]
        source = self._sources[turn % len(self._sources)]
        self._cuda.wait_event(slot.free_event, self._stream)
        self._cuda.to_device(slot.address, source, self._size, self._stream)
        self._cuda.record_event(slot.ready_event, self._stream)
