"""CUDA's runtime through cuda-python: memory, copies, streams, events and graphs.

cuda-python is imported when it is asked for, since only sessions on a GPU need it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from wanx.errors import EnvironmentMismatchError

RESERVED_BYTES = (
    256 << 20
)  # bytes for what CUDA and TensorRT load while they run, which nobody predicts
_allocated: dict[int, int] = {}  # bytes by address: of the process, as state outlives its session


class CudaError(Exception):
    """A call of CUDA that failed."""


class Cuda:
    """The GPU that is current, and a stream on it that waits for no other.

    Addresses are integers. Where a stream may be named, it is this one by default. Every method
    raises :class:`CudaError` where CUDA refuses, but for those that free: what cannot be freed any
    more goes with the process.
    """

    def __init__(self, runtime: Any, budget: int | None = None) -> None:
        """Open a stream.

        Args:
            runtime: the module ``cuda.bindings.runtime``.
            budget: bytes of the GPU's memory that this process may allocate in all.
        """
        self._cuda = runtime
        self._budget = budget
        self.stream: Any = self.open_stream()

    def close(self) -> None:
        """Close the stream once it is done."""
        if self.stream is not None:
            stream, self.stream = self.stream, None
            self.close_stream(stream)

    def open_stream(self) -> Any:
        """Open another stream, whose work runs beside that of the others."""
        return self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)

    def close_stream(self, stream: Any) -> None:
        """Close a stream once it is done."""
        self._release("cudaStreamDestroy", stream)

    @property
    def sm(self) -> str:
        """The kind of the GPU, such as ``sm89``."""
        attributes = self._cuda.cudaDeviceAttr
        device = self._call("cudaGetDevice")
        major, minor = (
            int(self._call("cudaDeviceGetAttribute", attribute, device))
            for attribute in (
                attributes.cudaDevAttrComputeCapabilityMajor,
                attributes.cudaDevAttrComputeCapabilityMinor,
            )
        )
        return f"sm{major}{minor}"

    def free_memory(self) -> int:
        """Bytes of the GPU's memory that nobody uses."""
        free, _ = self._calls("cudaMemGetInfo")
        return int(free)

    def available_memory(self) -> int:
        """Bytes of it that may be allocated: some are kept free, and there may be a budget."""
        free = self.free_memory() - RESERVED_BYTES
        left = free if self._budget is None else self._budget - sum(_allocated.values())
        return max(0, min(free, left))

    def allocate(self, size: int) -> int:
        """Allocate memory of the GPU."""
        address = int(self._call("cudaMalloc", size))
        _allocated[address] = size
        return address

    def free(self, address: int) -> None:
        """Free memory of the GPU; waits for everything that runs."""
        _allocated.pop(address)
        self._release("cudaFree", address)

    def allocate_pinned(self, size: int) -> int:
        """Allocate page-locked host memory, which is copied while the host goes on."""
        return int(self._call("cudaMallocHost", size))

    def free_pinned(self, address: int) -> None:
        """Free page-locked host memory."""
        self._release("cudaFreeHost", address)

    def to_device(self, device: int, host: int, size: int, stream: Any = None) -> None:
        """Queue a copy from pinned memory; both must stay until it is done."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", device, host, size, kind, self._or_ours(stream))

    def to_host(self, host: int, device: int, size: int) -> None:
        """Queue a copy to pinned memory; both must stay until it is done."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", host, device, size, kind, self.stream)

    def synchronize(self, stream: Any = None) -> None:
        """Wait until everything in the stream is done."""
        self._call("cudaStreamSynchronize", self._or_ours(stream))

    def create_event(self) -> Any:
        """Create an event."""
        return self._call("cudaEventCreate")

    def record_event(self, event: Any, stream: Any = None) -> None:
        """Record ``event`` in ``stream`` (cudaEventRecord)."""
        self._call("cudaEventRecord", event, self._or_ours(stream))

    def wait_event(self, event: Any, stream: Any = None) -> None:
        """Make ``stream`` wait for ``event`` (cudaStreamWaitEvent)."""
        self._call("cudaStreamWaitEvent", self._or_ours(stream), event, 0)

    def synchronize_event(self, event: Any) -> None:
        """Wait on the host until ``event`` has occurred; one never recorded has."""
        self._call("cudaEventSynchronize", event)

    def close_event(self, event: Any) -> None:
        """Free an event."""
        self._release("cudaEventDestroy", event)

    def begin_capture(self) -> None:
        """Begin stream capture."""
        # Other threads may go on allocating meanwhile.
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self.stream, mode)

    def end_capture(self) -> Any:
        """End stream capture and instantiate the graph."""
        graph = self._call("cudaStreamEndCapture", self.stream)
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._release("cudaGraphDestroy", graph)

    def abort_capture(self) -> None:
        """End stream capture without a graph; raises nothing, as it follows a failure."""
        _, graph = self._cuda.cudaStreamEndCapture(self.stream)
        if graph is not None and int(graph):
            self._release("cudaGraphDestroy", graph)
        self._cuda.cudaGetLastError()

    def launch_graph(self, graph: Any) -> None:
        """Queue an instantiated graph."""
        self._call("cudaGraphLaunch", graph, self.stream)

    def free_graph(self, graph: Any) -> None:
        """Free an instantiated graph."""
        self._release("cudaGraphExecDestroy", graph)

    def _or_ours(self, stream: Any) -> Any:
        return self.stream if stream is None else stream

    def _call(self, name: str, *arguments: Any) -> Any:
        values = self._calls(name, *arguments)
        return values[0] if values else None

    def _release(self, name: str, *arguments: Any) -> None:
        (code,) = getattr(self._cuda, name)(*arguments)
        if int(code):
            self._cuda.cudaGetLastError()

    def _calls(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        code, *values = getattr(self._cuda, name)(*arguments)
        if int(code):
            self._cuda.cudaGetLastError()  # else a later call would report it again
            raise CudaError(f"{name}: {_text(self._cuda, code)}")
        return tuple(values)


def open_cuda(extra: str, budget: int | None = None) -> Cuda:
    """Open the GPU.

    Args:
        extra: the one of wanx that brings cuda-python.
        budget: bytes of its memory that this process may allocate in all.

    Raises:
        EnvironmentMismatchError: cuda-python is not installed, or there is no GPU that it can use.
    """
    try:
        runtime = import_module("cuda.bindings.runtime")
    except ImportError:
        raise EnvironmentMismatchError(
            "engines on a GPU need cuda-python (cuda-bindings), which is not installed; pip "
            f"install 'wanx[{extra}]'"
        ) from None
    code, count = runtime.cudaGetDeviceCount()
    if int(code) or not count:
        reason = _text(runtime, code) if int(code) else "there is none"
        raise EnvironmentMismatchError(
            f"this machine has no GPU that CUDA can use ({reason}); run on one that has, or `wanx "
            "build BUNDLE --target cpu` first"
        )
    return Cuda(runtime, budget)


def _text(runtime: Any, code: Any) -> str:
    _, text = runtime.cudaGetErrorString(code)
    return text.decode(errors="replace") if isinstance(text, bytes) else str(text)
