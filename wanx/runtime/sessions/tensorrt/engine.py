"""Schedule on TensorRT: numpy arrays in and out, weights and values between on the GPU."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from wanx.bundle.engine_schedule import EngineSchedule
from wanx.errors import WanxError
from wanx.runtime.sessions.base import NEXT, Array, State
from wanx.runtime.sessions.device.cuda import Cuda, CudaError
from wanx.runtime.sessions.device.memory import DeviceTensor, MemoryPool
from wanx.runtime.sessions.device.staging import Staging, read
from wanx.runtime.sessions.device.stored_types import as_input
from wanx.runtime.sessions.device.weight_files import StepWeights
from wanx.runtime.sessions.device.weights import GIB, DeviceWeights
from wanx.runtime.sessions.engine_session import (
    MAX_CACHED_SHAPES,
    RUNS_BEFORE_CAPTURE,
    KernelTime,
    dead_after_step,
)
from wanx.runtime.sessions.tensorrt.inputs import repeat_to_batch, select_state
from wanx.runtime.sessions.tensorrt.loader import Loader, TensorRTError
from wanx.runtime.sessions.tensorrt.profile import layer_times
from wanx.runtime.sessions.tensorrt.program import EngineContext, Shape
from wanx.runtime.sessions.tensorrt.shapes import ShapeBuffers, StepShapes, infer_shapes

Shapes = dict[str, Shape]
Key = tuple[tuple[tuple[str, Shape], ...], frozenset[str]]
_log = logging.getLogger("wanx.runtime")


class ScheduleRunner:
    """Runner of a schedule's steps.

    Weights are loaded at once, as many as the memory holds. The first run of a shape takes all the
    memory that the shape needs, and keeps it; weights make room where there is too little, and are
    streamed from then on. The third run of a shape is captured as one CUDA graph, unless there is
    state or streaming; ``WANX_CUDA_GRAPHS=0`` turns that off.
    """

    def __init__(
        self,
        component: str,
        schedule: EngineSchedule,
        folder: Path,
        outputs: Sequence[str],
        weights: Sequence[StepWeights],
        loader: Loader,
        cuda: Cuda,
    ) -> None:
        """Load programs and weights.

        Args:
            component: its name, for the log.
            schedule: what runs.
            folder: where its programs are.
            outputs: the values to return.
            weights: of each step, where they come from.
            loader: loads engines.
            cuda: the GPU; closed with the engine.
        """
        self.schedule = schedule
        self._component = component
        self._outputs = outputs
        self._dead_after_step = dead_after_step(schedule, outputs)
        self._cuda = cuda
        self._trt = loader.trt
        self._constants: dict[str, Array] = {}
        self._constants_version = 0
        self._buffers: dict[Key, ShapeBuffers] = {}
        self._captures = os.environ.get("WANX_CUDA_GRAPHS") != "0"
        self._staging = Staging(cuda)
        self._programs: dict[str, EngineContext] = {}
        self._weights = DeviceWeights(weights, cuda)
        try:
            self._require_memory(self._weights.min_bytes, "its weights take")
            for name, program in schedule.programs.items():
                self._programs[name] = EngineContext(loader, folder / program.file, program)
            self._fit_weights(0, "its weights take")
        except BaseException:
            self.close()
            raise

    def bind(self, constants: Mapping[str, Array]) -> None:
        """Set inputs that stay the same from run to run."""
        types = self.schedule.input_dtypes
        # A copy: the caller may change its array later.
        self._constants |= {n: np.array(as_input(a, types[n])) for n, a in constants.items()}
        self._constants_version += 1

    def run(self, feeds: Mapping[str, Array], state: State | None) -> dict[str, Array]:
        """Run all steps; see :meth:`wanx.runtime.sessions.base.Session.run`."""
        inputs = {
            name: as_input(array, self.schedule.input_dtypes[name]) for name, array in feeds.items()
        }
        state_inputs = select_state(self.schedule, state)
        constants = {
            n: a for n, a in self._constants.items() if n not in inputs and n not in state_inputs
        }
        if (
            missing := self.schedule.input_dtypes.keys()
            - inputs.keys()
            - state_inputs.keys()
            - constants.keys()
        ):
            raise WanxError(f"a run lacks the input {min(missing)}")
        inputs, constants = repeat_to_batch(self.schedule.batched, inputs, constants)
        arrays = inputs | constants
        shapes: Shapes = {n: a.shape for n, a in arrays.items()} | {
            n: t.shape for n, t in state_inputs.items()
        }
        key = (tuple(sorted(shapes.items())), frozenset(inputs))
        buffers = self._buffers.get(key) or self._allocate(key, shapes, arrays)
        sent = inputs if buffers.constants_version == self._constants_version else arrays
        try:
            return self._run(buffers, sent, state_inputs, state)
        finally:
            with suppress(CudaError):  # no memory may be used again before it is read
                self._cuda.synchronize()

    def kernel_times(self, call: Callable[[], object]) -> list[KernelTime]:
        """Measure the layers that ``call`` runs; no graph is captured or launched meanwhile."""
        profilers = {name: layer_times(self._trt) for name in self._programs}
        captures, self._captures = self._captures, False
        for name, program in self._programs.items():
            program.set_profiler(profilers[name])
        try:
            call()
        finally:
            self._captures = captures
            for program in self._programs.values():
                program.set_profiler(None)
        return [
            KernelTime(program=program, name=layer, calls=len(spent), seconds=sum(spent))
            for program, profiler in profilers.items()
            for layer, spent in profiler.seconds.items()
        ]

    def close(self) -> None:
        """Free everything."""
        for key in list(self._buffers):
            self._drop(key)
        for program in self._programs.values():
            program.close()
        self._programs.clear()
        self._constants.clear()
        self._weights.close()
        self._staging.close()
        self._cuda.close()

    def _run(
        self,
        buffers: ShapeBuffers,
        sent: Mapping[str, Array],
        state_inputs: Mapping[str, DeviceTensor],
        state: State | None,
    ) -> dict[str, Array]:
        staged = [self._staging.send(array, buffers.inputs[name]) for name, array in sent.items()]
        buffers.runs += 1
        constant = state is None and not self._weights.streamed
        capture = self._captures and constant and buffers.runs > RUNS_BEFORE_CAPTURE
        if capture and (buffers.graph is not None or self._capture(buffers)):
            self._cuda.launch_graph(buffers.graph)
            results = buffers.outputs
        else:
            results = self._launch(buffers, state_inputs)
        kept = {n for n in results if state is not None and n.endswith(NEXT)}
        fetched = {n: self._staging.fetch(tensor) for n, tensor in results.items() if n not in kept}
        self._cuda.synchronize()
        staged.clear()
        buffers.constants_version = self._constants_version
        if state is not None:
            state |= {name.removesuffix(NEXT): results[name] for name in kept}
        return {name: read(results[name], buffer) for name, buffer in fetched.items()}

    def _launch(
        self, buffers: ShapeBuffers, state_inputs: Mapping[str, DeviceTensor]
    ) -> dict[str, DeviceTensor]:
        """Enqueue every step; freed memory serves the next step that needs as much."""
        values = {**buffers.inputs, **state_inputs}
        steps = zip(self.schedule.steps, buffers.shapes.steps, self._dead_after_step, strict=True)
        for weights, (step, shapes, done) in zip(self._weights.iter_steps(), steps, strict=True):
            inputs = [values[name] for name in step.inputs]
            results = self._enqueue(step.program, shapes, inputs, weights, buffers)
            values |= dict(zip(step.outputs, results, strict=True))
            for name in done:
                del values[name]
        return {name: values[name] for name in self._outputs}

    def _enqueue(
        self,
        name: str,
        shapes: StepShapes,
        inputs: Sequence[DeviceTensor],
        weights: Sequence[int],
        buffers: ShapeBuffers,
    ) -> list[DeviceTensor]:
        program = self._programs[name]
        program.set_shapes(shapes.inputs, self._cuda.stream)
        results = [
            DeviceTensor(buffers.pool.allocate(size), program.types[output], shape)
            for output, shape, size in zip(
                program.outputs, shapes.outputs, shapes.sizes, strict=True
            )
        ]
        assert buffers.workspace is not None, "the memory of this shape was freed"
        addresses = [*(t.address for t in inputs), *weights, *(t.address for t in results)]
        program.enqueue(addresses, buffers.workspace.address, self._cuda.stream)
        return results

    def _capture(self, buffers: ShapeBuffers) -> bool:
        """Capture the steps as a CUDA graph; they run one by one for good where that fails."""
        try:
            for name, program in self._programs.items():
                if not program.can_be_captured(self._cuda.stream):
                    raise TensorRTError(f"TensorRT says that {name} cannot be recorded")
            self._cuda.begin_capture()
            try:
                buffers.outputs = self._launch(buffers, {})
            except BaseException:
                self._cuda.abort_capture()
                raise
            buffers.graph = self._cuda.end_capture()
        except (CudaError, TensorRTError) as error:
            self._captures = False
            buffers.outputs = {}
            _log.warning("programs run one by one, as recording them failed: %s", str(error))
            return False
        return True

    def _allocate(self, key: Key, shapes: Shapes, inputs: Collection[str]) -> ShapeBuffers:
        """Allocate the memory for a shape."""
        inferred = infer_shapes(
            self.schedule, self._programs, shapes, inputs, self._dead_after_step, self._cuda.stream
        )
        if len(self._buffers) == MAX_CACHED_SHAPES:
            self._drop(next(iter(self._buffers)))
        self._make_room(inferred.total_bytes)
        buffers = ShapeBuffers(inferred, MemoryPool.on_device(self._cuda))
        try:
            buffers.allocate(self.schedule, {name: shapes[name] for name in inputs})
        except BaseException:
            buffers.close(self._cuda.free_graph)
            raise
        self._buffers[key] = buffers
        return buffers

    def _make_room(self, needed: int) -> None:
        """Free ``needed`` bytes before anything is computed: of other shapes, then of weights.

        Raises:
            MemoryError: says what is needed, and what there is.
            WanxError: the host has too little memory to stream from.
        """
        while needed > self._cuda.available_memory() and self._buffers:
            self._drop(next(iter(self._buffers)))
        weights = self._weights
        if needed > self._cuda.available_memory() or not weights.loaded:
            self._fit_weights(needed, "this size takes")
        ours = weights.held + sum(each.shapes.total_bytes for each in self._buffers.values())
        _log.info(
            "%s: %.2f of %.2f GiB of GPU memory%s",
            self._component,
            (ours + needed) / GIB,
            (ours + self._cuda.available_memory()) / GIB,
            f", {weights.streamed} of {weights.blocks} blocks streamed" if weights.streamed else "",
        )

    def _fit_weights(self, needed: int, what: str) -> None:
        """Load weights into all memory but ``needed`` bytes; see :meth:`_make_room`."""
        self._require_memory(self._weights.min_bytes + needed, what)
        self._weights.load_within(self._cuda.available_memory() + self._weights.held - needed)

    def _require_memory(self, needed: int, what: str) -> None:
        """Raise MemoryError for what does not fit even if everything of ours results room."""
        room = self._cuda.available_memory() + self._weights.held
        if needed > room:
            raise MemoryError(
                f"{what} at least {needed / GIB:.2f} GiB of the GPU's memory, and {room / GIB:.2f} "
                "GiB are free or allowed by --vram-budget"
            )

    def _drop(self, key: Key) -> None:
        self._buffers.pop(key).close(self._cuda.free_graph)
