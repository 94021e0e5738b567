"""Shapes of every step, and the memory for them, for given shapes of the inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wanx.bundle.engine_schedule import EngineSchedule
from wanx.runtime.sessions.device.memory import (
    DeviceTensor,
    MemoryPool,
    PooledBuffer,
    rounded,
    tensor_bytes,
)
from wanx.runtime.sessions.tensorrt.loader import TensorRTError
from wanx.runtime.sessions.tensorrt.program import EngineContext, Shape


@dataclass(frozen=True, kw_only=True)
class StepShapes:
    """Shapes of a step's inputs and outputs, and bytes of its outputs."""

    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class InferredShapes:
    """Shapes of all steps.

    Attributes:
        steps: in order.
        workspace_bytes: largest workspace of a step.
        total_bytes: of all memory beside the weights.
    """

    steps: tuple[StepShapes, ...]
    workspace_bytes: int
    total_bytes: int


def infer_shapes(
    schedule: EngineSchedule,
    programs: Mapping[str, EngineContext],
    shapes: Mapping[str, Shape],
    host_inputs: Iterable[str],
    dead_after_step: Sequence[Sequence[str]],
    stream: Any,
) -> InferredShapes:
    """Infer the shapes of all steps, and the memory that a pool will allocate for them.

    Args:
        schedule: what runs.
        programs: its engines.
        shapes: of the inputs.
        host_inputs: inputs that come from the host; the others are on the GPU already.
        dead_after_step: values that can be freed after each step.
        stream: of CUDA.

    Raises:
        UsageError: an engine does not cover a shape.
        TensorRTError: TensorRT refuses one.
    """
    known = dict(shapes)
    live: dict[str, int] = {}
    idle: Counter[int] = Counter()
    total_bytes = sum(
        rounded(tensor_bytes(schedule.input_dtypes[name], shapes[name])) for name in host_inputs
    )
    workspace_bytes = 0
    steps = []
    for step, done in zip(schedule.steps, dead_after_step, strict=True):
        program = programs[step.program]
        inputs = tuple(known[name] for name in step.inputs)
        program.set_shapes(inputs, stream)
        outputs = tuple(program.output_shapes())
        if any(size < 0 for shape in outputs for size in shape):
            raise TensorRTError(f"{step.program} does not tell the shapes of what it gives")
        sizes = tuple(
            tensor_bytes(program.types[name], shape)
            for name, shape in zip(program.outputs, outputs, strict=True)
        )
        workspace_bytes = max(workspace_bytes, program.workspace_bytes)
        steps.append(StepShapes(inputs=inputs, outputs=outputs, sizes=sizes))
        allocated = [rounded(size) for size in sizes]
        for size in allocated:
            if idle[size]:
                idle[size] -= 1
            else:
                total_bytes += size
        for name, shape, size in zip(step.outputs, outputs, allocated, strict=True):
            if name in live:
                idle[live[name]] += 1
            known[name], live[name] = shape, size
        for name in done:
            if name in live:
                idle[live.pop(name)] += 1
    return InferredShapes(
        steps=tuple(steps),
        workspace_bytes=workspace_bytes,
        total_bytes=total_bytes + rounded(workspace_bytes),
    )


class ShapeBuffers:
    """Memory and CUDA graph of one shape, reused by every run.

    Attributes:
        shapes: of the steps.
        pool: of the outputs of steps.
        inputs: those that come from the host.
        workspace: of all programs.
        runs: number of runs so far.
        constants_version: version of the constants in ``inputs``.
        graph: a captured CUDA graph of all steps, or None.
        outputs: results of that graph.
    """

    def __init__(self, shapes: InferredShapes, pool: MemoryPool) -> None:
        self.shapes = shapes
        self.pool = pool
        self.inputs: dict[str, DeviceTensor] = {}
        self.workspace: PooledBuffer | None = None
        self.runs = 0
        self.constants_version = -1
        self.graph: Any = None
        self.outputs: dict[str, DeviceTensor] = {}

    def allocate(self, schedule: EngineSchedule, shapes: Mapping[str, Shape]) -> None:
        """Allocate what stays: inputs of these shapes, and the workspace.

        Raises:
            CudaError: there is too little.
        """
        self.workspace = self.pool.allocate(self.shapes.workspace_bytes)
        for name, shape in shapes.items():
            dtype = schedule.input_dtypes[name]
            buffer = self.pool.allocate(tensor_bytes(dtype, shape))
            self.inputs[name] = DeviceTensor(buffer, dtype, shape)

    def close(self, free_graph: Callable[[Any], None]) -> None:
        """Free it all; what others refer to is freed when they let it go."""
        if self.graph is not None:
            free_graph(self.graph)
            self.graph = None
        self.outputs.clear()
        self.inputs.clear()
        self.workspace = None
        self.pool.close()
