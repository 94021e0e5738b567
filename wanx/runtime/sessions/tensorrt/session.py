"""Sessions on engines of TensorRT and TensorRT-RTX, on a GPU and without PyTorch.

Weights go from the bundle's files to the GPU once, and stay there as far as they fit. Constants
and state stay there too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from wanx.bundle.engine_schedule import EngineSchedule, read_schedule
from wanx.bundle.reader import Bundle
from wanx.bundle.trust import require_trusted
from wanx.errors import CorruptInputError, EnvironmentMismatchError
from wanx.runtime.sessions.base import Array, State
from wanx.runtime.sessions.device.cuda import open_cuda
from wanx.runtime.sessions.device.weight_files import plan_weights
from wanx.runtime.sessions.engine_session import EngineSession, KernelTime
from wanx.runtime.sessions.tensorrt.engine import ScheduleRunner
from wanx.runtime.sessions.tensorrt.library import MODULES, RTX_SMS, import_tensorrt
from wanx.runtime.sessions.tensorrt.loader import Loader


class TensorRTSession(EngineSession):
    """A component as engines of TensorRT."""

    def __init__(
        self,
        bundle: Bundle,
        component: str,
        *,
        threads: int | None = None,
        vram_budget: int | None = None,
    ) -> None:
        """Load ``component``; see :func:`wanx.runtime.sessions.open_session`.

        Raises:
            EnvironmentMismatchError: it was built for another GPU or TensorRT, or this machine
                lacks what runs it.
            CorruptInputError: engines, schedule and weights do not fit together.
            WanxError: the GPU has too little memory.
        """
        self.component, self.bundle = component, bundle
        self.target = bundle.manifest.target
        record = bundle.manifest.components[component]
        path = bundle.held(record.engines[self.target])
        schedule = read_schedule(path)
        trt = _require_module(schedule, bundle)
        with self._explained(), ExitStack() as stack:
            cuda = open_cuda(self.target, vram_budget)
            stack.callback(cuda.close)
            _require_gpu(schedule, bundle, cuda.sm)
            require_trusted(bundle, component, self.target)
            files = [bundle.held(file) for file in record.weights]
            weights = plan_weights(schedule, files, component)
            loader = Loader(trt, cuda.sm, _rebuild(bundle, cuda.sm))
            self._runner = ScheduleRunner(
                component, schedule, path.parent, record.outputs, weights, loader, cuda
            )
            stack.pop_all()

    @property
    def schedule(self) -> EngineSchedule:
        """The programs and steps that run."""
        return self._runner.schedule

    def bind(self, constants: Mapping[str, Array]) -> None:
        """Set constant inputs; the first run of a shape copies them to the GPU."""
        with self._explained():
            self._runner.bind(constants)

    def run(self, feeds: Mapping[str, Array], state: State | None = None) -> dict[str, Array]:
        """Run the engines; see :meth:`Session.run`. Outputs are float32."""
        with self._explained():
            return self._runner.run(feeds, state)

    def kernel_times(self, call: Callable[[], object]) -> list[KernelTime]:
        """Measure layers with TensorRT's profiler; see :meth:`EngineSession.kernel_times`."""
        return self._runner.kernel_times(call)

    def close(self) -> None:
        """Free engines and weights."""
        with self._explained():
            self._runner.close()


def _require_module(schedule: EngineSchedule, bundle: Bundle) -> Any:
    """Import the TensorRT that built the engines.

    Raises:
        EnvironmentMismatchError: it is installed in another version.
    """
    target = bundle.manifest.target
    name, _, version = schedule.compiler.partition(" ")
    if name != MODULES[target]:
        raise CorruptInputError(
            f"the engines of {bundle.root} for {target} were built by {schedule.compiler}; run "
            f"`{_rebuild(bundle)}`"
        )
    trt = import_tensorrt(name, parses=False)
    if version != trt.__version__:
        raise EnvironmentMismatchError(
            f"the engines of {bundle.root} were built for {schedule.compiler}, found {name} "
            f"{trt.__version__}: run `{_rebuild(bundle)}`"
        )
    return trt


def _require_gpu(schedule: EngineSchedule, bundle: Bundle, sm: str) -> None:
    """Refuse engines of other GPUs.

    Raises:
        EnvironmentMismatchError: says how to build them for this one.
    """
    built = schedule.device.split("+")
    ampere_plus = not built[-1] and int(sm[2:]) >= int(built[-2][2:])  # sm80+
    if sm not in built and not ampere_plus:
        raise EnvironmentMismatchError(
            f"the engines of {bundle.root} were built for {schedule.device}, found {sm}: run "
            f"`{_rebuild(bundle, sm)}`"
        )


def _rebuild(bundle: Bundle, sm: str | None = None) -> str:
    """Command that builds the engines for this machine."""
    target = bundle.manifest.target
    if target == "rtx" and sm is not None:
        # TensorRT-RTX is for GeForce and workstations; data-centre GPUs have TensorRT.
        target = f"{target}:{sm}" if sm in RTX_SMS else "tensorrt"
    return bundle.build_command(target)
