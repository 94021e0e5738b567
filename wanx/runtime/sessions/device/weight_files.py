"""Layout of a schedule's weights per step, and copies from the bundle's files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wanx.bundle.engine_schedule import EngineSchedule, StoredType
from wanx.config.number_formats import BY_SAFETENSORS
from wanx.files.floats import CENTRED, FLOATS, NUMPY, convert
from wanx.files.safetensors import TensorRef, read_header
from wanx.runtime.sessions.device.cuda import Cuda, CudaError
from wanx.runtime.sessions.device.memory import host_view, rounded
from wanx.runtime.sessions.engine_session import misshaped_weight, missing_weight

STAGE = 16 << 20  # bytes of each of the two pinned buffers


@dataclass(frozen=True)
class WeightSlice:
    """A weight in the memory of its step: its sources one after the other."""

    sources: tuple[TensorRef, ...]
    dtype: StoredType
    offset: int


@dataclass(frozen=True, kw_only=True)
class StepWeights:
    """The weights of a step, in one piece of memory.

    Attributes:
        slices: the weights, in the order of their program.
        size: bytes of all together.
    """

    slices: tuple[WeightSlice, ...]
    size: int

    @property
    def offsets(self) -> tuple[int, ...]:
        """Offset of each weight in that memory."""
        return tuple(weight.offset for weight in self.slices)


def plan_weights(
    schedule: EngineSchedule, files: Iterable[Path], component: str
) -> list[StepWeights]:
    """Lay out the weights of each step; only the headers of the files are read.

    Raises:
        CorruptInputError: a weight is missing, or is not what the schedule says.
    """
    known: dict[str, TensorRef] = {}
    for file in files:
        known |= read_header(file).entries
    steps: list[StepWeights] = []
    for step in schedule.steps:
        slices: list[WeightSlice] = []
        end = 0
        for weight in schedule.programs[step.program].weights:
            names = [f"{step.prefix}{source}" for source in weight.sources]
            for name in names:
                if name not in known:
                    raise missing_weight(component, name)
            sources = tuple(known[name] for name in names)
            for source in sources:
                pair = source.dtype, weight.dtype
                if len(set(pair)) > 1 and pair != CENTRED and not set(pair) <= FLOATS:
                    raise misshaped_weight(component, source.name, [source.dtype], [weight.dtype])
            count = math.prod(weight.shape)
            if sum(math.prod(source.shape) for source in sources) != count:
                raise misshaped_weight(component, names[0], sources[0].shape, weight.shape)
            slices.append(WeightSlice(sources, weight.dtype, end))
            end += rounded(BY_SAFETENSORS[weight.dtype].nbytes(count))
        steps.append(StepWeights(slices=tuple(slices), size=end))
    return steps


def copy_to_host(weights: StepWeights, address: int) -> None:
    """Copy the weights of a step to the host's memory at ``address``."""
    memory = host_view(address, weights.size)
    for offset, chunk in _chunks([(weights, 0)]):
        memory[offset : offset + len(chunk)] = chunk


def copy_to_device(steps: Iterable[tuple[StepWeights, int]], cuda: Cuda) -> None:
    """Copy the weights of steps to the GPU's memory, each to its address.

    One of two pinned buffers is filled from the files while the other is copied.

    Raises:
        CudaError: CUDA refuses.
    """
    pinned: list[int] = []
    events: list[Any] = []
    try:
        for _ in range(2):
            pinned.append(cuda.allocate_pinned(STAGE))
            events.append(cuda.create_event())
        turn = 0
        for address, chunk in _chunks(steps):
            cuda.synchronize_event(events[turn])
            host_view(pinned[turn], STAGE)[: len(chunk)] = chunk
            cuda.to_device(address, pinned[turn], len(chunk))
            cuda.record_event(events[turn])
            turn = 1 - turn
    finally:
        with suppress(CudaError):
            cuda.synchronize()
        for event in events:
            cuda.close_event(event)
        for buffer in pinned:
            cuda.free_pinned(buffer)
    cuda.synchronize()


def _chunks(
    steps: Iterable[tuple[StepWeights, int]],
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield addresses and bytes of the weights, in pieces that fit a pinned buffer."""
    files: dict[Path, NDArray[np.uint8]] = {}
    for weight, base in ((weight, base) for step, base in steps for weight in step.slices):
        address = base + weight.offset
        for source in weight.sources:
            if source.file not in files:
                files[source.file] = np.memmap(source.file, np.uint8, mode="r")
            stored = files[source.file][source.offset : source.offset + source.nbytes]
            bits, wider = (BY_SAFETENSORS[dtype].bits for dtype in (source.dtype, weight.dtype))
            portion = STAGE * bits // max(bits, wider)
            for start in range(0, stored.nbytes, portion):
                chunk = stored[start : start + portion]
                if source.dtype != weight.dtype:
                    # A tensor may lie at any byte of its file.
                    values = np.frombuffer(chunk.tobytes(), NUMPY[source.dtype])
                    chunk = convert(values, source.dtype, weight.dtype).view(np.uint8)
                yield address, chunk
                address += chunk.nbytes
