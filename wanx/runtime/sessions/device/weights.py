"""The weights of all steps: on the GPU where they fit, streamed to it from the host otherwise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from wanx.errors import WanxError
from wanx.runtime.sessions.device.cuda import Cuda, CudaError
from wanx.runtime.sessions.device.weight_files import StepWeights, copy_to_device, copy_to_host
from wanx.runtime.sessions.device.weight_ring import SLOTS, WeightRing

GIB = 1 << 30


class DeviceWeights:
    """Where the weights of each step are.

    Only steps whose weights are equally large are streamed, the blocks of a network, as what there
    is beside them is small. All that is streamed lies in pinned
    memory of the host in the type that engines take, so that a copy is as fast as the bus.

    Attributes:
        blocks: how many steps could be streamed.
        least: bytes of the GPU's memory that they need at the least.
    """

    def __init__(self, steps: Sequence[StepWeights], cuda: Cuda) -> None:
        """Plan for ``steps``; nothing is loaded."""
        self._steps = steps
        self._cuda = cuda
        by_size: Counter[int] = Counter()
        for weights in steps:
            by_size[weights.size] += weights.size
        ((self._unit, _),) = by_size.most_common(1)
        self._alike = [n for n, weights in enumerate(steps) if weights.size == self._unit]
        self._total = sum(weights.size for weights in steps)
        self.blocks = len(self._alike)
        self.least = min(self._total, self._bytes(self.blocks))
        self._resident: dict[int, int] = {}  # addresses by step
        self._pinned: dict[int, int] = {}
        self._ring: WeightRing | None = None
        self._whole = False  # whether the ring stands at the first step
        self.loaded = False

    @property
    def streamed(self) -> int:
        """How many steps have their weights copied in each run."""
        return len(self._pinned)

    @property
    def held(self) -> int:
        """Bytes of the GPU's memory that they take."""
        return self._bytes(self.streamed) if self.loaded else 0

    def fit(self, room: int) -> None:
        """Load as much as ``room`` bytes of the GPU's memory hold, at least :attr:`least`.

        What is loaded already stays where it can; nothing may be queued that reads it.

        Raises:
            CudaError: CUDA refuses.
            WanxError: the host has too little memory.
        """
        assert room >= self.least, "the caller checks that it fits"
        count = 0 if self._total <= room else SLOTS + 1
        while self._bytes(count) > room:
            count += 1
        # Evenly spread: while a copy runs, steps whose weights are there compute.
        streamed = [
            step
            for number, step in enumerate(self._alike)
            if (number + 1) * count // self.blocks > number * count // self.blocks
        ]
        try:
            self._arrange(streamed)
        except BaseException:
            self.close()
            raise

    def in_turn(self) -> Iterator[list[int]]:
        """Addresses of the weights of each step, in order.

        What reads them must be queued before the next ones are asked for.

        Raises:
            CudaError: CUDA refuses.
        """
        if self._ring is not None and not self._whole:
            self._ring.restart()
        self._whole = False
        for number, weights in enumerate(self._steps):
            passing = self._ring if number in self._pinned else None
            base = self._resident.get(number, 0) if passing is None else passing.take()
            yield [base + offset for offset in weights.offsets]
            if passing is not None:
                passing.give_back()
        self._whole = True

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
        """What they take of the GPU's memory when so many steps are streamed."""
        return self._total - count * self._unit + (SLOTS * self._unit if count else 0)

    def _arrange(self, streamed: Collection[int]) -> None:
        """Free first, so that memory of both kinds is never above what it is in the end."""
        wanted = {n for n, weights in enumerate(self._steps) if weights.size} - set(streamed)
        self._drop_ring()
        for step in self._resident.keys() - wanted:
            self._cuda.free(self._resident.pop(step))
        for step in self._pinned.keys() - set(streamed):
            self._cuda.free_pinned(self._pinned.pop(step))
        fresh = sorted(wanted - self._resident.keys())
        for step in fresh:
            self._resident[step] = self._cuda.allocate(self._steps[step].size)
        copy_to_device(((self._steps[step], self._resident[step]) for step in fresh), self._cuda)
        self._require_host_memory(streamed)
        for step in streamed:
            if step not in self._pinned:
                self._pinned[step] = self._cuda.allocate_pinned(self._unit)
                copy_to_host(self._steps[step], self._pinned[step])
        if streamed:
            sources = [self._pinned[step] for step in streamed]
            self._ring = WeightRing(self._cuda, self._unit, sources)
        self.loaded = True

    def _require_host_memory(self, streamed: Collection[int]) -> None:
        """Pinned memory cannot be swapped out, so what the host lacks would end other processes.

        Raises:
            WanxError: says what is needed, and what there is.
        """
        needed = self._unit * len(set(streamed) - self._pinned.keys())
        available = available_host_memory()
        if available is not None and needed > available:
            raise WanxError(
                f"{needed / GIB:.2f} GiB of weights do not fit the GPU, and of this machine's "
                f"memory, from which they would be streamed, {available / GIB:.2f} GiB are "
                "available; end other processes, or export with --precision fp8"
            )

    def _drop_ring(self) -> None:
        ring, self._ring = self._ring, None
        self._whole = False
        if ring is not None:
            with suppress(CudaError):
                self._cuda.wait()
            ring.close()


def available_host_memory() -> int | None:
    """Bytes of the host's memory that may be taken, caches included; None where nobody says."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kib = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        return int(kib) << 10
    return None
