"""Memory that is allocated once and used again, and tensors in it."""

from __future__ import annotations

import ctypes
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wanx.bundle.engine_schedule import InputType
from wanx.config.number_formats import BY_SAFETENSORS
from wanx.runtime.sessions.device.cuda import Cuda

_GRAIN = 512  # bytes, as CUDA aligns; TensorRT wants 256


def rounded(size: int) -> int:
    """Bytes that an allocation of ``size`` takes."""
    return max(1, -(-size // _GRAIN)) * _GRAIN


class Block:
    """Memory that goes back to its arena when nothing refers to it any more.

    What is queued in the stream may still use it then: its next user comes later in the stream.
    """

    def __init__(self, arena: Arena, address: int, size: int) -> None:
        self.address = address
        self.size = size
        self._arena = arena

    def __del__(self) -> None:
        self._arena._take_back(self.address, self.size)


class Arena:
    """Hands out memory, and keeps what comes back for the next who asks for as much."""

    def __init__(self, allocate: Callable[[int], int], free: Callable[[int], None]) -> None:
        """Take memory from ``allocate`` and give it to ``free`` in the end."""
        self._allocate = allocate
        self._free = free
        self._idle: dict[int, list[int]] = defaultdict(list)
        self._closed = False

    @classmethod
    def on_device(cls, cuda: Cuda) -> Arena:
        """An arena in the GPU's memory."""
        return cls(cuda.allocate, cuda.free)

    @classmethod
    def pinned(cls, cuda: Cuda) -> Arena:
        """An arena in memory of the host that the GPU copies from and to."""
        return cls(cuda.allocate_pinned, cuda.free_pinned)

    def take(self, size: int) -> Block:
        """Memory of at least ``size`` bytes.

        Raises:
            CudaError: there is too little.
        """
        assert not self._closed, "the arena is closed"
        size = rounded(size)
        idle = self._idle[size]
        return Block(self, idle.pop() if idle else self._allocate(size), size)

    def close(self) -> None:
        """Free what is idle now, and what is in use as soon as it comes back."""
        self._closed = True
        for addresses in self._idle.values():
            while addresses:
                self._free(addresses.pop())

    def _take_back(self, address: int, size: int) -> None:
        if self._closed:
            self._free(address)
        else:
            self._idle[size].append(address)


@dataclass(frozen=True)
class DeviceTensor:
    """A dense tensor in the GPU's memory."""

    block: Block
    dtype: InputType
    shape: tuple[int, ...]

    @property
    def address(self) -> int:
        """Of its first byte."""
        return self.block.address

    @property
    def nbytes(self) -> int:
        """Its size."""
        return tensor_bytes(self.dtype, self.shape)


def tensor_bytes(dtype: InputType, shape: Sequence[int]) -> int:
    """The size of a dense tensor."""
    return BY_SAFETENSORS[dtype].nbytes(math.prod(shape))


def host_view(address: int, size: int) -> NDArray[np.uint8]:
    """Pinned memory as a numpy array, valid as long as the memory is."""
    buffer: Any = (ctypes.c_uint8 * size).from_address(address)
    return np.frombuffer(buffer, np.uint8)
