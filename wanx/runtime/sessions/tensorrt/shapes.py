"""What a plan needs at one shape of its inputs: shapes of every step, and memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wanx.bundle.engine_schedule import Plan
from wanx.runtime.sessions.device.memory import Arena, Block, DeviceTensor, rounded, tensor_bytes
from wanx.runtime.sessions.tensorrt.loader import TensorRTError
from wanx.runtime.sessions.tensorrt.program import LoadedProgram, Shape


@dataclass(frozen=True, kw_only=True)
class StepShapes:
    """Shapes of what a step takes and gives, and bytes of what it gives."""

    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Walk:
    """The steps at one shape.

    Attributes:
        steps: their shapes.
        scratch: bytes that the largest of them works in.
        needed: bytes of all memory beside the weights.
    """

    steps: tuple[StepShapes, ...]
    scratch: int
    needed: int


def walk(
    plan: Plan,
    programs: Mapping[str, LoadedProgram],
    shapes: Mapping[str, Shape],
    given: Iterable[str],
    last_use: Sequence[Sequence[str]],
    stream: Any,
) -> Walk:
    """Find the shapes of all steps, and how much memory an arena will take for them.

    Args:
        plan: what runs.
        programs: its engines.
        shapes: of the inputs.
        given: inputs that come from the host; the others are on the GPU already.
        last_use: after which step each value is needed no more.
        stream: of CUDA.

    Raises:
        UsageError: an engine does not cover a shape.
        TensorRTError: TensorRT refuses one.
    """
    known = dict(shapes)
    live: dict[str, int] = {}
    idle: Counter[int] = Counter()
    needed = sum(rounded(tensor_bytes(plan.types[name], shapes[name])) for name in given)
    scratch = 0
    steps = []
    for step, done in zip(plan.steps, last_use, strict=True):
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
        scratch = max(scratch, program.scratch)
        steps.append(StepShapes(inputs=inputs, outputs=outputs, sizes=sizes))
        taken = [rounded(size) for size in sizes]
        for size in taken:
            if idle[size]:
                idle[size] -= 1
            else:
                needed += size
        for name, shape, size in zip(step.outputs, outputs, taken, strict=True):
            if name in live:
                idle[live[name]] += 1
            known[name], live[name] = shape, size
        for name in done:
            if name in live:
                idle[live.pop(name)] += 1
    return Walk(steps=tuple(steps), scratch=scratch, needed=needed + rounded(scratch))


class Place:
    """The memory of one shape, used again at each run.

    Attributes:
        walk: shapes of the steps.
        arena: where values come from that the steps make.
        given: inputs that come from the host.
        scratch: what all programs work in.
        runs: how many there were.
        bound: which of the constants given so far are in ``given``.
        recording: a CUDA graph of all steps, or None.
        outputs: what that leaves its results in.
    """

    def __init__(self, found: Walk, arena: Arena) -> None:
        self.walk = found
        self.arena = arena
        self.given: dict[str, DeviceTensor] = {}
        self.scratch: Block | None = None
        self.runs = 0
        self.bound = -1
        self.recording: Any = None
        self.outputs: dict[str, DeviceTensor] = {}

    def take(self, plan: Plan, shapes: Mapping[str, Shape]) -> None:
        """Take the memory that stays: the inputs of these shapes, and that to work in.

        Raises:
            CudaError: there is too little.
        """
        self.scratch = self.arena.take(self.walk.scratch)
        for name, shape in shapes.items():
            dtype = plan.types[name]
            block = self.arena.take(tensor_bytes(dtype, shape))
            self.given[name] = DeviceTensor(block, dtype, shape)

    def close(self, free_recording: Callable[[Any], None]) -> None:
        """Free it all; what others hold is freed when they let it go."""
        if self.recording is not None:
            free_recording(self.recording)
            self.recording = None
        self.outputs.clear()
        self.given.clear()
        self.scratch = None
        self.arena.close()
