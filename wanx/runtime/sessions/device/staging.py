"""Copies of numpy arrays to the GPU and back, through a pool of pinned memory."""

from __future__ import annotations

import numpy as np

from wanx.files.floats import NUMPY
from wanx.runtime.sessions.base import Array
from wanx.runtime.sessions.device.cuda import Cuda
from wanx.runtime.sessions.device.memory import DeviceTensor, MemoryPool, PooledBuffer, host_view
from wanx.runtime.sessions.device.stored_types import as_float32


class Staging:
    """Queues copies in the GPU's stream; blocks must stay until they are done."""

    def __init__(self, cuda: Cuda) -> None:
        """Take pinned memory from ``cuda`` as it is needed."""
        self._cuda = cuda
        self._pinned = MemoryPool.pinned(cuda)

    def send(self, array: Array, tensor: DeviceTensor) -> PooledBuffer:
        """Queue a copy to the GPU, from the buffer that is returned.

        Raises:
            CudaError: CUDA refuses.
        """
        buffer = self._pinned.allocate(array.nbytes)
        host_view(buffer.address, array.nbytes)[:] = array.reshape(-1).view(np.uint8)
        self._cuda.to_device(tensor.address, buffer.address, array.nbytes)
        return buffer

    def fetch(self, tensor: DeviceTensor) -> PooledBuffer:
        """Queue a copy to the host, into the buffer that is returned.

        Raises:
            CudaError: CUDA refuses.
        """
        buffer = self._pinned.allocate(tensor.nbytes)
        self._cuda.to_host(buffer.address, tensor.address, tensor.nbytes)
        return buffer

    def close(self) -> None:
        """Free the memory."""
        self._pinned.close()


def read(tensor: DeviceTensor, buffer: PooledBuffer) -> Array:
    """Convert what was fetched to float32, in memory of its own."""
    stored = host_view(buffer.address, tensor.nbytes).view(NUMPY[tensor.dtype])
    return as_float32(stored, tensor.dtype).reshape(tensor.shape)
