"""Numpy arrays to the GPU and back, through pinned memory that is used again."""

from __future__ import annotations

import numpy as np

from wanx.files.floats import NUMPY
from wanx.runtime.sessions.base import Array
from wanx.runtime.sessions.device.cuda import Cuda
from wanx.runtime.sessions.device.memory import Arena, Block, DeviceTensor, host_view
from wanx.runtime.sessions.device.stored_types import as_float32


class Staging:
    """Queues copies in the GPU's stream; blocks must stay until they are done."""

    def __init__(self, cuda: Cuda) -> None:
        """Take pinned memory from ``cuda`` as it is needed."""
        self._cuda = cuda
        self._pinned = Arena.pinned(cuda)

    def send(self, array: Array, tensor: DeviceTensor) -> Block:
        """Queue a copy to the GPU, from the block that is returned.

        Raises:
            CudaError: CUDA refuses.
        """
        block = self._pinned.take(array.nbytes)
        host_view(block.address, array.nbytes)[:] = array.reshape(-1).view(np.uint8)
        self._cuda.to_device(tensor.address, block.address, array.nbytes)
        return block

    def fetch(self, tensor: DeviceTensor) -> Block:
        """Queue a copy to the host, into the block that is returned.

        Raises:
            CudaError: CUDA refuses.
        """
        block = self._pinned.take(tensor.nbytes)
        self._cuda.to_host(block.address, tensor.address, tensor.nbytes)
        return block

    def close(self) -> None:
        """Free the memory."""
        self._pinned.close()


def read(tensor: DeviceTensor, block: Block) -> Array:
    """What was fetched, as float32 in memory of its own."""
    stored = host_view(block.address, tensor.nbytes).view(NUMPY[tensor.dtype])
    return as_float32(stored, tensor.dtype).reshape(tensor.shape)
