"""Engine of TensorRT with its execution context: shapes, addresses, enqueueing.

The names of an engine's inputs and outputs are those that building gave its graph: what a step
takes, then ``weight.<parameter>`` for each weight; and ``out.<name>``. An engine lists them in the
order of the graph, which is also the schedule's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wanx.bundle.engine_schedule import InputType, Program
from wanx.config.number_formats import GRAPH_INPUTS
from wanx.errors import CorruptInputError, UsageError
from wanx.runtime.sessions.tensorrt.cache import RuntimeCache
from wanx.runtime.sessions.tensorrt.loader import Loader, TensorRTError

WEIGHT = "weight."
_TYPES: dict[str, InputType] = {row.tensorrt: row.safetensors for row in GRAPH_INPUTS}
Shape = tuple[int, ...]


class EngineContext:
    """Engine and execution context; memory is the caller's.

    Attributes:
        inputs: names of a step's inputs.
        weights: names of the weights.
        outputs: names of a step's outputs.
        types: of all of them.
        workspace_bytes: size of the workspace at the shapes that are set.
    """

    def __init__(self, loader: Loader, path: Path, program: Program) -> None:
        """Load the engine of ``program`` from ``path``.

        Raises:
            EnvironmentMismatchError: it was made for something else than this machine.
            CorruptInputError: it is damaged, or not what the schedule says.
            TensorRTError: it cannot be made ready.
        """
        self._loader = loader
        self._log = loader.log
        trt = loader.trt
        self._path = path
        self._engine = engine = loader.load(path)
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self.inputs = tuple(name for name in inputs if not name.startswith(WEIGHT))
        self.weights = tuple(name for name in inputs if name.startswith(WEIGHT))
        self.outputs = tuple(name for name in names if name not in inputs)
        self.types = {name: self._type(name) for name in names}
        weights = [(self.types[n], tuple(engine.get_tensor_shape(n))) for n in self.weights]
        if weights != [(weight.dtype, weight.shape) for weight in program.weights]:
            raise CorruptInputError(
                f"{path}: its weights are not those of its plan; run `{loader.rebuild} --force`"
            )
        self._config: Any = None
        self._cache: RuntimeCache | None = None
        self._context: Any = self._new_context()
        self._profile = 0
        self._shapes: list[Shape] | None = None
        self._memory = 0
        self.workspace_bytes = 0

    def set_shapes(self, shapes: Sequence[Shape], stream: Any) -> None:
        """Set the shapes of the inputs; cheap where they are set already.

        Raises:
            UsageError: the engine does not cover them; says which it covers.
            TensorRTError: TensorRT refuses.
        """
        if self._shapes == list(shapes):
            return
        self._shapes = None
        profile = self._profile_for(shapes)
        self._log.clear()
        if profile != self._profile:
            self._require(
                self._context.set_optimization_profile_async(profile, int(stream)),
                "changing the profile",
            )
            self._profile = profile
        for name, shape in zip(self.inputs, shapes, strict=True):
            self._require(self._context.set_input_shape(name, shape), f"the shape of {name}")
        self.workspace_bytes = int(self._context.update_device_memory_size_for_shapes())
        self._shapes = list(shapes)
        self._memory = 0

    def output_shapes(self) -> list[Shape]:
        """Shapes of the outputs at the input shapes that are set."""
        return [tuple(self._context.get_tensor_shape(name)) for name in self.outputs]

    def enqueue(self, addresses: Sequence[int], memory: int, stream: Any) -> None:
        """Enqueue the engine in a stream.

        Args:
            addresses: of the inputs, the weights and the outputs.
            memory: at least :attr:`workspace_bytes` bytes.
            stream: of CUDA.

        Raises:
            TensorRTError: TensorRT refuses.
        """
        self._log.clear()
        if self.workspace_bytes and memory != self._memory:
            self._context.set_device_memory(memory, self.workspace_bytes)
            self._memory = memory
        names = (*self.inputs, *self.weights, *self.outputs)
        for name, address in zip(names, addresses, strict=True):
            self._require(self._context.set_tensor_address(name, address), name)
        self._require(self._context.execute_async_v3(int(stream)), "running it")

    def can_be_captured(self, stream: Any) -> bool:
        """Ask TensorRT if a CUDA graph may contain this engine; True where it cannot tell."""
        if not hasattr(self._context, "is_stream_capturable"):
            return True
        return bool(self._context.is_stream_capturable(int(stream)))

    def set_profiler(self, profiler: Any) -> None:
        """Attach a ``trt.IProfiler`` to every run; None detaches it."""
        self._context.profiler = profiler

    def close(self) -> None:
        """Free the engine, and save what was compiled for it."""
        if self._cache is not None:
            self._cache.write()
        # A context must go before what it was made from.
        self._context = None
        self._config = self._cache = None
        self._engine = None

    def _type(self, name: str) -> InputType:
        dtype = self._engine.get_tensor_dtype(name).name
        if dtype not in _TYPES:
            raise CorruptInputError(f"{self._path}: {name} is {dtype}, which wanx does not use")
        return _TYPES[dtype]

    def _profile_for(self, shapes: Sequence[Shape]) -> int:
        for profile in range(self._engine.num_optimization_profiles):
            if all(
                self._covers(name, shape, profile)
                for name, shape in zip(self.inputs, shapes, strict=True)
            ):
                return profile
        name, shape = next(
            (n, s) for n, s in zip(self.inputs, shapes, strict=True) if not self._covers(n, s, 0)
        )
        smallest, _, largest = self._engine.get_tensor_profile_shape(name, 0)
        raise UsageError(
            f"the engine {self._path.name} takes {name} from {list(smallest)} to {list(largest)}, "
            f"not {list(shape)}: choose another size, or run `{self._loader.rebuild}` with --sizes "
            "and --frames that cover it"
        )

    def _covers(self, name: str, shape: Shape, profile: int) -> bool:
        smallest, _, largest = map(tuple, self._engine.get_tensor_profile_shape(name, profile))
        return len(shape) == len(smallest) and all(
            low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True)
        )

    def _new_context(self) -> Any:
        trt, engine = self._loader.trt, self._engine
        # Programs run one after the other, so that one memory serves all of them, and it need not
        # be as large as for the largest shapes.
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._log.clear()
        if hasattr(engine, "create_runtime_config"):
            self._config = config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            if hasattr(config, "dynamic_shapes_kernel_specialization_strategy"):
                # Otherwise other kernels run until the right ones are compiled in the background:
                # a CUDA graph would keep those, and the same seed give another video.
                config.dynamic_shapes_kernel_specialization_strategy = (
                    trt.DynamicShapesKernelSpecializationStrategy.EAGER
                )
            if hasattr(config, "create_runtime_cache"):
                self._cache = RuntimeCache(config, self._path, trt.__version__, self._loader.sm)
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context(strategy)
        self._require(context is not None, "making it ready")
        return context

    def _require(self, done: Any, what: str) -> None:
        if not done:
            raise TensorRTError(f"{self._path.stem}, {what}: {self._log.first_error()}")
