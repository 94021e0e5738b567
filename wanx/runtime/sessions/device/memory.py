"""Caching allocator, with free lists by size, and tensors in its memory."""

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
    """Bytes of an allocation for ``size`` bytes."""
    return max(1, -(-size // _GRAIN)) * _GRAIN


class PooledBuffer:
    """Memory that returns to its pool when nothing refers to it any more.

    What is queued in the stream may still use it then: its next user comes later in the stream.
    """

    def __init__(self, pool: MemoryPool, address: int, size: int) -> None:
        self.address = address
        self.size = size
        self._pool = pool

    def __del__(self) -> None:
        self._pool._return(self.address, self.size)


class MemoryPool:
    """Caching allocator: returned memory serves later requests of the same size."""

    def __init__(self, allocate: Callable[[int], int], free: Callable[[int], None]) -> None:
        """Take memory from ``allocate`` and give it to ``free`` in the end."""
        self._allocate = allocate
        self._free = free
        self._idle: dict[int, list[int]] = defaultdict(list)
        self._closed = False

    @classmethod
    def on_device(cls, cuda: Cuda) -> MemoryPool:
        """Pool in the GPU's memory."""
        return cls(cuda.allocate, cuda.free)

    @classmethod
    def pinned(cls, cuda: Cuda) -> MemoryPool:
        """Pool in page-locked host memory."""
        return cls(cuda.allocate_pinned, cuda.free_pinned)

    def allocate(self, size: int) -> PooledBuffer:
        """Allocate at least ``size`` bytes.

        Raises:
            CudaError: there is too little.
        """
        assert not self._closed, "the pool is closed"
        size = rounded(size)
        idle = self._idle[size]
        return PooledBuffer(self, idle.pop() if idle else self._allocate(size), size)

    def close(self) -> None:
        """Free what is idle now, and what is in use as soon as it comes back."""
        self._closed = True
        for addresses in self._idle.values():
            while addresses:
                self._free(addresses.pop())

    def _return(self, address: int, size: int) -> None:
        if self._closed:
            self._free(address)
        else:
            self._idle[size].append(address)


@dataclass(frozen=True)
class DeviceTensor:
    """A dense tensor in the GPU's memory."""

    buffer: PooledBuffer
    dtype: InputType
    shape: tuple[int, ...]

    @property
    def address(self) -> int:
        """Address of the first byte."""
        return self.buffer.address

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return tensor_bytes(self.dtype, self.shape)


def tensor_bytes(dtype: InputType, shape: Sequence[int]) -> int:
    """Bytes of a dense tensor."""
    return BY_SAFETENSORS[dtype].nbytes(math.prod(shape))


def host_view(address: int, size: int) -> NDArray[np.uint8]:
    """View of host memory as a numpy array, valid as long as the memory is."""
    buffer: Any = (ctypes.c_uint8 * size).from_address(address)
    return np.frombuffer(buffer, np.uint8)
