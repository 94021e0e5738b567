"""The programs of a plan on TensorRT with their weights: numpy in and out, the rest on the GPU."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from wanx.bundle.engine_schedule import Plan
from wanx.errors import WanxError
from wanx.runtime.sessions.base import NEXT, Array, State
from wanx.runtime.sessions.device.cuda import Cuda, CudaError
from wanx.runtime.sessions.device.memory import Arena, DeviceTensor
from wanx.runtime.sessions.device.staging import Staging, read
from wanx.runtime.sessions.device.stored_types import as_input
from wanx.runtime.sessions.device.weight_files import StepWeights
from wanx.runtime.sessions.device.weights import GIB, DeviceWeights
from wanx.runtime.sessions.engine_session import MOST_SHAPES, WARM_UPS, KernelTime, last_use
from wanx.runtime.sessions.tensorrt.loader import Loader, TensorRTError
from wanx.runtime.sessions.tensorrt.profile import layer_times
from wanx.runtime.sessions.tensorrt.program import LoadedProgram, Shape
from wanx.runtime.sessions.tensorrt.shapes import Place, StepShapes, walk

Shapes = dict[str, Shape]
Key = tuple[tuple[tuple[str, Shape], ...], frozenset[str]]
_log = logging.getLogger("wanx.runtime")


class Engine:
    """A loaded plan.

    Weights are loaded at once, as many as the memory holds. The first run of a shape takes all the
    memory that the shape needs, and keeps it; weights make room where there is too little, and are
    streamed from then on. The third run of a shape is recorded as one CUDA graph, unless there is
    state or streaming; ``WANX_CUDA_GRAPHS=0`` turns that off.
    """

    def __init__(
        self,
        component: str,
        plan: Plan,
        folder: Path,
        outputs: Sequence[str],
        weights: Sequence[StepWeights],
        loader: Loader,
        cuda: Cuda,
    ) -> None:
        """Load programs and weights.

        Args:
            component: its name, for the log.
            plan: what runs.
            folder: where its programs are.
            outputs: the values to return.
            weights: of each step, where they come from.
            loader: loads engines.
            cuda: the GPU; closed with the engine.
        """
        self.plan = plan
        self._component = component
        self._outputs = outputs
        self._last_use = last_use(plan, outputs)
        self._cuda = cuda
        self._trt = loader.trt
        self._constants: dict[str, Array] = {}
        self._bound = 0  # how often they were given
        self._places: dict[Key, Place] = {}
        self._records = os.environ.get("WANX_CUDA_GRAPHS") != "0"
        self._staging = Staging(cuda)
        self._programs: dict[str, LoadedProgram] = {}
        self._weights = DeviceWeights(weights, cuda)
        try:
            self._require_memory(self._weights.least, "its weights take")
            for name, program in plan.programs.items():
                self._programs[name] = LoadedProgram(loader, folder / program.file, program)
            self._fit_weights(0, "its weights take")
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
        self._weights.close()
        self._staging.close()
        self._cuda.close()

    def _run(
        self,
        place: Place,
        sent: Mapping[str, Array],
        held: Mapping[str, DeviceTensor],
        state: State | None,
    ) -> dict[str, Array]:
        staged = [self._staging.send(array, place.given[name]) for name, array in sent.items()]
        place.runs += 1
        alike = state is None and not self._weights.streamed
        records = self._records and alike and place.runs > WARM_UPS
        if records and (place.recording is not None or self._record(place)):
            self._cuda.replay(place.recording)
            made = place.outputs
        else:
            made = self._launch(place, held)
        kept = {n for n in made if state is not None and n.endswith(NEXT)}
        back = {n: self._staging.fetch(tensor) for n, tensor in made.items() if n not in kept}
        self._cuda.wait()
        staged.clear()
        place.bound = self._bound
        if state is not None:
            state |= {name.removesuffix(NEXT): made[name] for name in kept}
        return {name: read(made[name], block) for name, block in back.items()}

    def _launch(self, place: Place, held: Mapping[str, DeviceTensor]) -> dict[str, DeviceTensor]:
        """Put every step into the stream; memory goes on to the next step that needs as much."""
        values = {**place.given, **held}
        steps = zip(self.plan.steps, place.walk.steps, self._last_use, strict=True)
        for weights, (step, shapes, done) in zip(self._weights.in_turn(), steps, strict=True):
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
        self._make_room(found.needed)
        place = Place(found, Arena.on_device(self._cuda))
        try:
            place.take(self.plan, {name: shapes[name] for name in given})
        except BaseException:
            place.close(self._cuda.free_recording)
            raise
        self._places[key] = place
        return place

    def _make_room(self, needed: int) -> None:
        """Free ``needed`` bytes before anything is computed: of other shapes, then of weights.

        Raises:
            MemoryError: says what is needed, and what there is.
            WanxError: the host has too little memory to stream from.
        """
        while needed > self._cuda.available_memory() and self._places:
            self._drop(next(iter(self._places)))
        weights = self._weights
        if needed > self._cuda.available_memory() or not weights.loaded:
            self._fit_weights(needed, "this size takes")
        ours = weights.held + sum(place.walk.needed for place in self._places.values())
        _log.info(
            "%s: %.2f of %.2f GiB of GPU memory%s",
            self._component,
            (ours + needed) / GIB,
            (ours + self._cuda.available_memory()) / GIB,
            f", {weights.streamed} of {weights.blocks} blocks streamed" if weights.streamed else "",
        )

    def _fit_weights(self, needed: int, what: str) -> None:
        """Load weights into all memory but ``needed`` bytes; see :meth:`_make_room`."""
        self._require_memory(self._weights.least + needed, what)
        self._weights.fit(self._cuda.available_memory() + self._weights.held - needed)

    def _require_memory(self, needed: int, what: str) -> None:
        """Raise MemoryError for what does not fit even if everything of ours made room."""
        room = self._cuda.available_memory() + self._weights.held
        if needed > room:
            raise MemoryError(
                f"{what} at least {needed / GIB:.2f} GiB of the GPU's memory, and {room / GIB:.2f} "
                "GiB are free or allowed by --vram-budget"
            )

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
