"""CUDA and TensorRT without a GPU: memory is the host's, engines are functions of numpy arrays.

What is put into a stream is done only when somebody waits for it, so that memory which is used
again or freed too early shows. Streams run beside each other in the order that ``FakeCuda.hurry``
chooses among those which events allow. Every address is looked up; fresh and freed memory is
filled with a pattern.
"""

from __future__ import annotations

import bisect
import json
from collections import Counter, deque
from collections.abc import Callable, Sequence
from enum import IntEnum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from wanx.files.floats import NUMPY
from wanx.runtime.sessions.device.stored_types import as_float32, as_input

GARBAGE = 0xA5
OUT_OF_MEMORY, INVALID, CAPTURING = 2, 1, 900
TEXTS = {
    2: b"out of memory",
    1: b"invalid argument",
    900: b"operation not permitted when capturing",
}


# What a stream does next; or an event that it waits for, recorded so often.
Work = Callable[[], None] | tuple[str, int]


class Memory:
    """One kind of memory: what is allocated, and of how much at most."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.peak = 0
        self.live: dict[int, np.ndarray] = {}
        self.allocations = 0
        self._kept: list[np.ndarray] = []  # freed memory is not handed out again

    @property
    def used(self) -> int:
        return sum(len(data) for data in self.live.values())

    def allocate(self, size: int) -> int | None:
        if self.used + size > self.limit:
            return None
        whole = np.full(size + 512, GARBAGE, np.uint8)
        start = -whole.ctypes.data % 512
        data = whole[start : start + size]
        self._kept.append(whole)
        self.live[data.ctypes.data] = data
        self.allocations += 1
        self.peak = max(self.peak, self.used)
        return int(data.ctypes.data)

    def free(self, address: int) -> None:
        self.live.pop(address)[:] = GARBAGE

    def view(self, address: int, size: int) -> np.ndarray:
        """Memory at an address; it must be allocated, all of it."""
        starts = sorted(self.live)
        place = bisect.bisect_right(starts, address) - 1
        assert place >= 0, f"{address:#x} is not allocated"
        data = self.live[starts[place]]
        offset = address - starts[place]
        assert offset + size <= len(data), f"{size} bytes at {address:#x} are not allocated"
        return data[offset : offset + size]


class FakeCuda:
    """The module ``cuda.bindings.runtime``, as far as it is used; one GPU."""

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaDeviceAttr = SimpleNamespace(
        cudaDevAttrComputeCapabilityMajor=75, cudaDevAttrComputeCapabilityMinor=76
    )

    def __init__(self, sm: int = 89, memory: int = 1 << 30) -> None:
        self.sm = sm
        self.count, self.state = 1, 0
        self.device, self.host = Memory(memory), Memory(1 << 32)
        self.streams: dict[int, deque[Work]] = {}
        self.hurry: Callable[[list[int]], int] = min  # which of the streams goes on
        self.marks: Counter[str] = Counter()  # how often an event was recorded,
        self.passed: Counter[str] = Counter()  # and how far its streams are
        self.graph: list[Callable[[], None]] | None = None
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.open: set[str] = set()
        self.calls: list[str] = []
        self.refuses: set[str] = set()

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name.startswith("cuda") and callable(found):
            self.calls.append(name)
            if name in self.refuses:
                return lambda *_: (INVALID, None)
        return found

    def cudaGetDeviceCount(self) -> tuple[int, int | None]:
        return self.state, None if self.state else self.count

    def cudaGetDevice(self) -> tuple[int, int]:
        return 0, 0

    def cudaDeviceGetAttribute(self, attribute: int, device: int) -> tuple[int, int]:
        return 0, self.sm // 10 if attribute == 75 else self.sm % 10

    def cudaGetErrorString(self, code: int) -> tuple[int, bytes]:
        return 0, TEXTS.get(code, b"CUDA driver version is insufficient for CUDA runtime version")

    def cudaGetLastError(self) -> tuple[int]:
        return (0,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        assert flags == self.cudaStreamNonBlocking
        stream = 7 + len(self.calls)
        self.streams[stream] = deque()
        self.open.add(f"stream {stream}")
        return 0, stream

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        self.run(lambda: not self.streams[stream])
        self.open.remove(f"stream {stream}")
        del self.streams[stream]
        return (0,)

    def cudaMemGetInfo(self) -> tuple[int, int, int]:
        return 0, self.device.limit - self.device.used, self.device.limit

    def cudaMalloc(self, size: int) -> tuple[int, int | None]:
        if self.graph is not None:
            return CAPTURING, None
        found = self.device.allocate(size)
        return (OUT_OF_MEMORY, None) if found is None else (0, found)

    def cudaFree(self, address: int) -> tuple[int]:
        assert self.graph is None, "memory is freed while a graph is recorded"
        self.run()
        self.device.free(address)
        return (0,)

    def cudaMallocHost(self, size: int) -> tuple[int, int | None]:
        return 0, self.host.allocate(size)

    def cudaFreeHost(self, address: int) -> tuple[int]:
        self.run()
        self.host.free(address)
        return (0,)

    def cudaMemcpyAsync(
        self, to: int, source: int, size: int, kind: int, stream: Any
    ) -> tuple[int]:
        into, out_of = (self.device, self.host) if kind == 1 else (self.host, self.device)

        def copy() -> None:
            into.view(to, size)[:] = out_of.view(source, size)

        self.put(copy, stream)
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        if self.graph is not None:
            return (CAPTURING,)
        self.run(lambda: not self.streams[stream])
        return (0,)

    def cudaEventCreate(self) -> tuple[int, str]:
        name = f"event {len(self.calls)}"
        self.open.add(name)
        return 0, name

    def cudaEventRecord(self, event: str, stream: int) -> tuple[int]:
        assert self.graph is None
        assert event in self.open
        self.marks[event] += 1
        number = self.marks[event]

        def passes() -> None:
            self.passed[event] = max(self.passed[event], number)

        self.put(passes, stream)
        return (0,)

    def cudaStreamWaitEvent(self, stream: int, event: str, flags: int) -> tuple[int]:
        assert self.graph is None
        assert event in self.open
        self.streams[stream].append((event, self.marks[event]))
        return (0,)

    def cudaEventSynchronize(self, event: str) -> tuple[int]:
        number = self.marks[event]
        self.run(lambda: self.passed[event] >= number)
        return (0,)

    def cudaEventDestroy(self, event: str) -> tuple[int]:
        self.open.remove(event)
        return (0,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:
        assert self.graph is None
        self.graph = []
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, int | None]:
        assert self.graph is not None
        key = len(self.calls)
        self.graphs[key], self.graph = self.graph, None
        self.open.add(f"graph {key}")
        return 0, key

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[int, int]:
        self.open.add(f"executable {graph}")
        return 0, graph

    def cudaGraphDestroy(self, graph: int) -> tuple[int]:
        self.open.remove(f"graph {graph}")
        return (0,)

    def cudaGraphExecDestroy(self, graph: int) -> tuple[int]:
        self.run()
        self.open.remove(f"executable {graph}")
        del self.graphs[graph]
        return (0,)

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[int]:
        self.streams[stream].extend(self.graphs[graph])
        return (0,)

    def put(self, work: Callable[[], None], stream: int) -> None:
        if self.graph is None:
            self.streams[stream].append(work)
        else:
            self.graph.append(work)

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Do what is in the streams, as much as is needed; without a condition all of it."""
        while not until() and any(self.streams.values()):
            ready = [s for s, todo in self.streams.items() if todo and self._ready(todo[0])]
            assert ready, "streams wait for each other"
            work = self.streams[self.hurry(ready)].popleft()
            if not isinstance(work, tuple):
                work()

    def _ready(self, work: Work) -> bool:
        return not isinstance(work, tuple) or self.passed[work[0]] >= work[1]


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2


class Mode(IntEnum):
    INPUT = 1
    OUTPUT = 2


class DataType(IntEnum):
    FLOAT = 0
    HALF = 1
    BF16 = 7
    INT8 = 2
    INT64 = 8
    FP8 = 6
    INT4 = 9


class Strategy(IntEnum):
    STATIC = 0
    USER_MANAGED = 2


class Diagnostics(IntEnum):
    OLD_CUDA_DRIVER = 4
    INSUFFICIENT_GPU_MEMORY = 16
    MALFORMED_ENGINE = 32


TYPES = {"F32": "FLOAT", "F16": "HALF", "BF16": "BF16", "I8": "INT8", "I64": "INT64", "I4": "INT4"}
Function = Callable[..., Sequence[np.ndarray]]


class FakeTensorRT(ModuleType):
    """The module ``tensorrt``. Engines are JSON; what they compute is in ``functions``."""

    __version__ = "99.0"
    TensorIOMode = Mode
    DataType = DataType
    IProfiler = object
    ExecutionContextAllocationStrategy = Strategy
    EngineInvalidityDiagnostics = Diagnostics

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING = Severity

    def __init__(
        self, cuda: FakeCuda, functions: dict[str, Function], *, rtx: bool = False
    ) -> None:
        super().__init__("tensorrt")
        self.__spec__ = ModuleSpec("tensorrt", None)
        self.cuda, self.functions = cuda, functions
        self.rtx = rtx
        self.order: list[str] = []
        self.bits = 0
        self.capturable = True
        self.refuses: set[str] = set()
        self.contexts: list[Context] = []
        if rtx:
            self.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")

    def Runtime(self, log: Any) -> Runtime:
        return Runtime(self, log)


class Runtime:
    def __init__(self, trt: FakeTensorRT, log: Any) -> None:
        self.trt, self.log = trt, log

    def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
        self.trt.order.append("deserialise")
        try:
            return Engine(self.trt, self.log, json.loads(data))
        except ValueError:
            self.log.log(Severity.WARNING, "a warning")
            self.log.log(Severity.ERROR, "header.size == blobSize\nfailed")
            self.log.log(Severity.ERROR, "what follows")
            return None

    def get_engine_validity(self, data: bytes) -> tuple[int, int]:
        return 2, self.trt.bits


class Engine:
    def __init__(self, trt: FakeTensorRT, log: Any, made: dict[str, Any]) -> None:
        self.trt, self.log, self.made = trt, log, made
        self.tensors = {t["name"]: t for t in made["tensors"]}
        self.num_io_tensors = len(self.tensors)
        self.num_optimization_profiles = made.get("profiles", 1)
        if trt.rtx:
            self.create_runtime_config = lambda: Config(trt)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> Mode:
        return Mode.OUTPUT if name.startswith("out.") else Mode.INPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[TYPES[self.tensors[name]["dtype"]]]

    def get_tensor_shape(self, name: str) -> list[int]:
        least, most = self.tensors[name].get("shapes", [[-1], [-2]])
        return [a if a == b else -1 for a, b in zip(least, most, strict=True)]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[list[int]]:
        least, most = self.tensors[name]["shapes"]
        scale = 1 + profile  # a later profile goes further
        return [
            least,
            least,
            [a if a == b else b * scale for a, b in zip(least, most, strict=True)],
        ]

    def create_execution_context(self, how: Any) -> Context | None:
        if "context" in self.trt.refuses:
            self.log.log(Severity.ERROR, "CUDA error 2: out of memory")
            return None
        if self.trt.rtx:
            assert how.strategy == Strategy.USER_MANAGED
            assert how.dynamic_shapes_kernel_specialization_strategy == "eager"
        else:
            assert how == Strategy.USER_MANAGED
        context = Context(self.trt, self.log, self, how)
        self.trt.contexts.append(context)
        return context


class Config:
    def __init__(self, trt: FakeTensorRT) -> None:
        self.trt = trt
        self.dynamic_shapes_kernel_specialization_strategy = "lazy"
        self.cache: Cache | None = None

    def set_execution_context_allocation_strategy(self, strategy: Strategy) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> Cache:
        return Cache()

    def set_runtime_cache(self, cache: Cache) -> bool:
        self.cache = cache
        return True


class Cache:
    def __init__(self) -> None:
        self.data = b""

    def deserialize(self, data: bytes) -> bool:
        if not data.startswith(b"kernels"):
            return False
        self.data = data
        return True

    def serialize(self) -> bytes:
        return self.data


class Context:
    """Checks that everything is given before it runs, and runs when the stream does."""

    def __init__(self, trt: FakeTensorRT, log: Any, engine: Engine, config: Any) -> None:
        self.trt, self.log, self.engine, self.config = trt, log, engine, config
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.profiler: Any = None
        self.memory = (0, 0)
        self.updated = False
        self.profile = 0
        self.runs = 0

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        self.shapes.clear()
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self.engine.get_tensor_profile_shape(name, self.profile)
        if self.shapes.get(name) != shape:
            self.memory = 0, 0  # it was given for other shapes
        self.shapes[name] = shape
        self.updated = False
        return all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True))

    def update_device_memory_size_for_shapes(self) -> int:
        self.updated = True
        return self.scratch()

    def scratch(self) -> int:
        if "scratch" in self.engine.made:
            return int(self.engine.made["scratch"])
        return 3 * sum(int(np.prod(s)) for s in self.shapes.values())

    def set_device_memory(self, address: int, size: int) -> None:
        self.memory = address, size

    def get_tensor_shape(self, name: str) -> list[int]:
        function = self.trt.functions[self.engine.made["function"]]
        given = [
            np.zeros(self._shape(n), np.int64 if self._type(n) == "I64" else np.float32)
            for n in self._given()
        ]
        made = function(*given)
        return list(made[self._made().index(name)].shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in self.engine.tensors
        self.addresses[name] = address
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return self.trt.capturable

    def execute_async_v3(self, stream: int) -> bool:
        self.runs += 1
        if self.profiler is not None:
            for layer in ("product", "rest"):
                self.profiler.report_layer_time(layer, 2.0)
        if "execute" in self.trt.refuses:
            self.log.log(Severity.ERROR, "launch failed")
            return False
        if "memory" in self.trt.refuses:
            self.log.log(Severity.ERROR, "OutOfMemory: out of memory")
            return False
        assert self.updated, "the memory for these shapes was not asked for"
        assert self.addresses.keys() == self.engine.tensors.keys()
        address, size = self.memory
        assert size >= self.scratch()
        cuda, function = self.trt.cuda, self.trt.functions[self.engine.made["function"]]
        given = [(self._type(n), self._shape(n), self.addresses[n]) for n in self._given()]
        made = [(self._type(n), self.addresses[n]) for n in self._made()]
        if self.config is not None and self.trt.rtx:
            self.config.cache.data = b"kernels compiled"

        def work() -> None:
            cuda.device.view(address, size)[:] = GARBAGE
            arrays = []
            for dtype, shape, place in given:
                numpy = NUMPY[dtype]
                bits = cuda.device.view(place, int(np.prod(shape)) * numpy.itemsize).view(numpy)
                arrays.append((bits if dtype == "I64" else as_float32(bits, dtype)).reshape(shape))
            results = function(*arrays)
            stored = [as_input(r, t) for r, (t, _) in zip(results, made, strict=True)]
            for array, (_, place) in zip(stored, made, strict=True):
                cuda.device.view(place, array.nbytes)[:] = array.reshape(-1).view(np.uint8)

        cuda.put(work, stream)
        return True

    def _given(self) -> list[str]:
        return [n for n in self.engine.tensors if not n.startswith("out.")]

    def _made(self) -> list[str]:
        return [n for n in self.engine.tensors if n.startswith("out.")]

    def _type(self, name: str) -> Any:
        return self.engine.tensors[name]["dtype"]

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.shapes.get(name) or tuple(self.engine.get_tensor_shape(name))


def engine_file(
    path: Path,
    function: str,
    inputs: dict[str, tuple[str, list[list[int]]]],
    outputs: dict[str, str],
    profiles: int = 1,
) -> None:
    """Write an engine that computes ``function``; each input has least and largest shape."""
    tensors: list[dict[str, Any]] = [
        {"name": name, "dtype": dtype, "shapes": shapes} for name, (dtype, shapes) in inputs.items()
    ]
    tensors += [{"name": f"out.{name}", "dtype": dtype} for name, dtype in outputs.items()]
    path.write_text(json.dumps({"function": function, "tensors": tensors, "profiles": profiles}))
