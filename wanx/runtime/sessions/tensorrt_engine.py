"""The programs of a plan on TensorRT with their weights: numpy in and out, the rest on the GPU."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from wanx.engine_plan import Plan
from wanx.errors import WanxError
from wanx.runtime.sessions.base import NEXT, Array, State
from wanx.runtime.sessions.cuda import Cuda, CudaError
from wanx.runtime.sessions.device_memory import Arena, Block, DeviceTensor, host_view
from wanx.runtime.sessions.engine_session import MOST_SHAPES, WARM_UPS, KernelTime, last_use
from wanx.runtime.sessions.engine_weights import WeightLayout, upload
from wanx.runtime.sessions.stored_types import NUMPY, as_float32, as_input
from wanx.runtime.sessions.tensorrt_loader import Loader, TensorRTError
from wanx.runtime.sessions.tensorrt_profile import layer_times
from wanx.runtime.sessions.tensorrt_program import LoadedProgram, Shape
from wanx.runtime.sessions.tensorrt_shapes import Place, StepShapes, walk

GIB = 1 << 30
Shapes = dict[str, Shape]
Key = tuple[tuple[tuple[str, Shape], ...], frozenset[str]]
_log = logging.getLogger("wanx.runtime")


class Engine:
    """A loaded plan.

    The first run of a shape takes all the memory that the shape needs, and keeps it. Its third run
    is recorded as one CUDA graph, unless there is state; ``WANX_CUDA_GRAPHS=0`` turns that off.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        outputs: Sequence[str],
        weights: WeightLayout,
        loader: Loader,
        cuda: Cuda,
    ) -> None:
        """Load programs and weights.

        Args:
            plan: what runs.
            folder: where its programs are.
            outputs: the values to return.
            weights: where each weight comes from and goes to.
            loader: loads engines.
            cuda: the GPU; closed with the engine.
        """
        self.plan = plan
        self._outputs = outputs
        self._last_use = last_use(plan, outputs)
        self._cuda = cuda
        self._trt = loader.trt
        self._constants: dict[str, Array] = {}
        self._bound = 0  # how often they were given
        self._places: dict[Key, Place] = {}
        self._records = os.environ.get("WANX_CUDA_GRAPHS") != "0"
        self._pinned = Arena.pinned(cuda)
        self._programs: dict[str, LoadedProgram] = {}
        self._weights = Arena.on_device(cuda)
        self._held: Block | None = None
        try:
            self._require_memory(weights.size, "its weights take")
            for name, program in plan.programs.items():
                self._programs[name] = LoadedProgram(loader, folder / program.file, program)
            self._held = self._weights.take(weights.size)
            base = self._held.address
            self._addresses = [[base + offset for offset in of] for of in weights.offsets]
            upload(weights, base, cuda)
        except BaseException:
            self.close()
            raise

    def bind(self, constants: Mapping[str, Array]) -> None:
        """Give inputs that stay the same from run to run."""
        types = self.plan.types
        # A copy: the caller may change its array later.
        self._constants |= {n: np.array(as_input(a, types[n])) for n, a in constants.items()}
        self._bound += 1

    def run(self, feeds: Mapping[str, Array], state: State | None) -> dict[str, Array]:
        """Run all steps; see :meth:`wanx.runtime.sessions.base.Session.run`."""
        given = {name: as_input(array, self.plan.types[name]) for name, array in feeds.items()}
        held = self._state(state)
        fixed = {n: a for n, a in self._constants.items() if n not in given and n not in held}
        if missing := self.plan.types.keys() - given.keys() - held.keys() - fixed.keys():
            raise WanxError(f"a run lacks the input {min(missing)}")
        given, fixed = self._with_batch(given, fixed)
        arrays = given | fixed
        shapes: Shapes = {n: a.shape for n, a in arrays.items()} | {
            n: t.shape for n, t in held.items()
        }
        key = (tuple(sorted(shapes.items())), frozenset(given))
        place = self._places.get(key) or self._new_place(key, shapes, arrays)
        sent = given if place.bound == self._bound else arrays
        try:
            return self._run(place, sent, held, state)
        finally:
            with suppress(CudaError):  # no memory may be used again before it is read
                self._cuda.wait()

    def kernel_times(self, call: Callable[[], object]) -> list[KernelTime]:
        """Measure the layers that ``call`` makes run; nothing is recorded or replayed meanwhile."""
        profilers = {name: layer_times(self._trt) for name in self._programs}
        records, self._records = self._records, False
        for name, program in self._programs.items():
            program.set_profiler(profilers[name])
        try:
            call()
        finally:
            self._records = records
            for program in self._programs.values():
                program.set_profiler(None)
        return [
            KernelTime(program=program, name=layer, calls=len(spent), seconds=sum(spent))
            for program, profiler in profilers.items()
            for layer, spent in profiler.seconds.items()
        ]

    def close(self) -> None:
        """Free everything."""
        for key in list(self._places):
            self._drop(key)
        for program in self._programs.values():
            program.close()
        self._programs.clear()
        self._constants.clear()
        self._held = None
        self._weights.close()
        self._pinned.close()
        self._cuda.close()

    def _run(
        self,
        place: Place,
        sent: Mapping[str, Array],
        held: Mapping[str, DeviceTensor],
        state: State | None,
    ) -> dict[str, Array]:
        staged = [self._send(array, place.given[name]) for name, array in sent.items()]
        place.runs += 1
        records = self._records and state is None and place.runs > WARM_UPS
        if records and (place.recording is not None or self._record(place)):
            self._cuda.replay(place.recording)
            made = place.outputs
        else:
            made = self._launch(place, held)
        kept = {n for n in made if state is not None and n.endswith(NEXT)}
        back = {n: self._fetch(tensor) for n, tensor in made.items() if n not in kept}
        self._cuda.wait()
        staged.clear()
        place.bound = self._bound
        if state is not None:
            state |= {name.removesuffix(NEXT): made[name] for name in kept}
        return {name: _read(made[name], block) for name, block in back.items()}

    def _launch(self, place: Place, held: Mapping[str, DeviceTensor]) -> dict[str, DeviceTensor]:
        """Put every step into the stream; memory goes on to the next step that needs as much."""
        values = {**place.given, **held}
        for step, shapes, weights, done in zip(
            self.plan.steps, place.walk.steps, self._addresses, self._last_use, strict=True
        ):
            given = [values[name] for name in step.inputs]
            made = self._enqueue(step.program, shapes, given, weights, place)
            values |= dict(zip(step.outputs, made, strict=True))
            for name in done:
                del values[name]
        return {name: values[name] for name in self._outputs}

    def _enqueue(
        self,
        name: str,
        shapes: StepShapes,
        given: Sequence[DeviceTensor],
        weights: Sequence[int],
        place: Place,
    ) -> list[DeviceTensor]:
        program = self._programs[name]
        program.set_shapes(shapes.inputs, self._cuda.stream)
        made = [
            DeviceTensor(place.arena.take(size), program.types[output], shape)
            for output, shape, size in zip(
                program.outputs, shapes.outputs, shapes.sizes, strict=True
            )
        ]
        assert place.scratch is not None, "the memory of this shape was freed"
        addresses = [*(t.address for t in given), *weights, *(t.address for t in made)]
        program.enqueue(addresses, place.scratch.address, self._cuda.stream)
        return made

    def _record(self, place: Place) -> bool:
        """Record the steps; they run one by one for good where that fails."""
        try:
            for name, program in self._programs.items():
                if not program.can_be_recorded(self._cuda.stream):
                    raise TensorRTError(f"TensorRT says that {name} cannot be recorded")
            self._cuda.begin_recording()
            try:
                place.outputs = self._launch(place, {})
            except BaseException:
                self._cuda.drop_recording()
                raise
            place.recording = self._cuda.end_recording()
        except (CudaError, TensorRTError) as error:
            self._records = False
            place.outputs = {}
            _log.warning("programs run one by one, as recording them failed: %s", str(error))
            return False
        return True

    def _new_place(self, key: Key, shapes: Shapes, given: Collection[str]) -> Place:
        """Take the memory for a shape."""
        found = walk(self.plan, self._programs, shapes, given, self._last_use, self._cuda.stream)
        if len(self._places) == MOST_SHAPES:
            self._drop(next(iter(self._places)))
        self._require_memory(found.needed, "this size takes")
        place = Place(found, Arena.on_device(self._cuda))
        try:
            place.take(self.plan, {name: shapes[name] for name in given})
        except BaseException:
            place.close(self._cuda.free_recording)
            raise
        self._places[key] = place
        return place

    def _require_memory(self, needed: int, what: str) -> None:
        """Refuse what does not fit before anything is computed; memory of other shapes goes first.

        Raises:
            MemoryError: says what is needed, and what there is.
        """
        free = self._cuda.free_memory()
        while needed > free and self._places:
            self._drop(next(iter(self._places)))
            free = self._cuda.free_memory()
        sizes = f"{needed / GIB:.2f} GiB of the GPU's memory, and {free / GIB:.2f} GiB are free"
        _log.info("%s about %s", what, sizes)
        if needed > free:
            raise MemoryError(f"{what} about {sizes}")

    def _drop(self, key: Key) -> None:
        self._places.pop(key).close(self._cuda.free_recording)

    def _state(self, state: State | None) -> dict[str, DeviceTensor]:
        """What of a state are inputs.

        Raises:
            WanxError: an engine that does not fit made it.
        """
        held = {n: v for n, v in (state or {}).items() if n in self.plan.types}
        for name, value in held.items():
            if not isinstance(value, DeviceTensor) or value.dtype != self.plan.types[name]:
                raise WanxError(f"the state {name} comes from another kind of engine")
        return held

    def _with_batch(self, *groups: Mapping[str, Array]) -> list[dict[str, Array]]:
        """Repeat what has a batch axis, of 1, as often as the others need."""
        batched = self.plan.batched
        batch = max((a.shape[0] for g in groups for n, a in g.items() if n in batched), default=1)
        return [
            {
                name: np.ascontiguousarray(np.broadcast_to(array, (batch, *array.shape[1:])))
                if name in batched
                else array
                for name, array in group.items()
            }
            for group in groups
        ]

    def _send(self, array: Array, tensor: DeviceTensor) -> Block:
        """Queue a copy to the GPU; what is returned must stay until it is done."""
        block = self._pinned.take(array.nbytes)
        host_view(block.address, array.nbytes)[:] = array.reshape(-1).view(np.uint8)
        self._cuda.to_device(tensor.address, block.address, array.nbytes)
        return block

    def _fetch(self, tensor: DeviceTensor) -> Block:
        """Queue a copy to the host."""
        block = self._pinned.take(tensor.nbytes)
        self._cuda.to_host(block.address, tensor.address, tensor.nbytes)
        return block


def _read(tensor: DeviceTensor, block: Block) -> Array:
    """What was copied to pinned memory, as float32 in memory of its own."""
    stored = host_view(block.address, tensor.nbytes).view(NUMPY[tensor.dtype])
    return as_float32(stored, tensor.dtype).reshape(tensor.shape)
