"""Weights of all steps: resident on the GPU where they fit, else streamed to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress

from wanx.errors import WanxError
from wanx.runtime.available_memory import available_memory
from wanx.runtime.sessions.device.cuda import Cuda, CudaError
from wanx.runtime.sessions.device.weight_files import StepWeights, copy_to_device, copy_to_host
from wanx.runtime.sessions.device.weight_ring import SLOTS, WeightRing

GIB = 1 << 30


class DeviceWeights:
    """Weights of each step, resident or streamed.

    Only the repeated blocks are streamed; the rest is small and stays resident. All that is
    streamed lies in pinned memory of the host in the type that engines take, so that a copy is as
    fast as the bus.

    Attributes:
        blocks: number of steps that could be streamed.
        min_bytes: of the GPU's memory, with all of those streamed.
    """

    def __init__(self, steps: Sequence[StepWeights], cuda: Cuda) -> None:
        """Plan for ``steps``; nothing is loaded."""
        self._steps = steps
        self._cuda = cuda
        by_size: Counter[int] = Counter()
        for weights in steps:
            by_size[weights.size] += weights.size
        ((self._block_bytes, _),) = by_size.most_common(1)
        self._streamable = [
            n for n, weights in enumerate(steps) if weights.size == self._block_bytes
        ]
        self._total = sum(weights.size for weights in steps)
        self.blocks = len(self._streamable)
        self.min_bytes = min(self._total, self._bytes(self.blocks))
        self._resident: dict[int, int] = {}  # addresses by step
        self._pinned: dict[int, int] = {}
        self._ring: WeightRing | None = None
        self._ring_primed = False  # whether the ring stands at the first step
        self.loaded = False

    @property
    def streamed(self) -> int:
        """Number of steps whose weights are copied in each run."""
        return len(self._pinned)

    @property
    def held(self) -> int:
        """Bytes of the GPU's memory in use."""
        return self._bytes(self.streamed) if self.loaded else 0

    def load_within(self, room: int) -> None:
        """Load as much as ``room`` bytes of the GPU's memory hold, at least :attr:`min_bytes`.

        What is loaded already stays where it can; nothing may be queued that reads it.

        Raises:
            CudaError: CUDA refuses.
            WanxError: the host has too little memory.
        """
        assert room >= self.min_bytes, "the caller checks that it fits"
        count = 0 if self._total <= room else SLOTS + 1
        while self._bytes(count) > room:
            count += 1
        # Evenly spread: while a copy runs, steps whose weights are there compute.
        streamed = [
            step
            for number, step in enumerate(self._streamable)
            if (number + 1) * count // self.blocks > number * count // self.blocks
        ]
        try:
            self._arrange(streamed)
        except BaseException:
            self.close()
            raise

    def iter_steps(self) -> Iterator[list[int]]:
        """Yield the addresses of the weights of each step, in order.

        What reads them must be queued before the next ones are asked for.

        Raises:
            CudaError: CUDA refuses.
        """
        if self._ring is not None and not self._ring_primed:
            self._ring.restart()
        self._ring_primed = False
        for number, weights in enumerate(self._steps):
            ring = self._ring if number in self._pinned else None
            base = self._resident.get(number, 0) if ring is None else ring.acquire()
            yield [base + offset for offset in weights.offsets]
            if ring is not None:
                ring.release()
        self._ring_primed = True

    def close(self) -> None:
        """Free everything."""
        self.loaded = False
        self._drop_ring()
        for address in self._resident.values():
            self._cuda.free(address)
        for address in self._pinned.values():
            self._cuda.free_pinned(address)
        self._resident.clear()
        self._pinned.clear()

    def _bytes(self, count: int) -> int:
        """Bytes of the GPU's memory with ``count`` steps streamed."""
        return self._total - count * self._block_bytes + (SLOTS * self._block_bytes if count else 0)

    def _arrange(self, streamed: Collection[int]) -> None:
        """Free, then load, so that neither memory ever exceeds its final size."""
        resident = {n for n, weights in enumerate(self._steps) if weights.size} - set(streamed)
        self._drop_ring()
        for step in self._resident.keys() - resident:
            self._cuda.free(self._resident.pop(step))
        for step in self._pinned.keys() - set(streamed):
            self._cuda.free_pinned(self._pinned.pop(step))
        fresh = sorted(resident - self._resident.keys())
        for step in fresh:
            self._resident[step] = self._cuda.allocate(self._steps[step].size)
        copy_to_device(((self._steps[step], self._resident[step]) for step in fresh), self._cuda)
        self._require_host_memory(streamed)
        for step in streamed:
            if step not in self._pinned:
                self._pinned[step] = self._cuda.allocate_pinned(self._block_bytes)
                copy_to_host(self._steps[step], self._pinned[step])
        if streamed:
            sources = [self._pinned[step] for step in streamed]
            self._ring = WeightRing(self._cuda, self._block_bytes, sources)
        self.loaded = True

    def _require_host_memory(self, streamed: Collection[int]) -> None:
        """Check the host's memory: what is pinned cannot be swapped out, and could end others.

        Raises:
            WanxError: says what is needed, and what there is.
        """
        needed = self._block_bytes * len(set(streamed) - self._pinned.keys())
        available = available_memory()
        if available is not None and needed > available:
            raise WanxError(
                f"{needed / GIB:.2f} GiB of weights do not fit the GPU, and of this machine's "
                f"memory, from which they would be streamed, {available / GIB:.2f} GiB are "
                "available; end other processes, or export with --precision fp8"
            )

    def _drop_ring(self) -> None:
        ring, self._ring = self._ring, None
        self._ring_primed = False
        if ring is not None:
            with suppress(CudaError):
                self._cuda.synchronize()
            ring.close()
