"""Sessions on AOTInductor packages; with ``engine.py`` all of the runtime that needs PyTorch.

Weights go from the bundle's files to the device once, and stay there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from wanx.bundle.engine_schedule import EngineSchedule, Step, Weight, read_schedule
from wanx.bundle.reader import Bundle
from wanx.bundle.trust import require_trusted
from wanx.errors import EnvironmentMismatchError
from wanx.runtime.sessions.aoti.engine import TYPES, ScheduleRunner
from wanx.runtime.sessions.base import NEXT, Array, State
from wanx.runtime.sessions.engine_session import (
    EngineSession,
    KernelTime,
    misshaped_weight,
    missing_weight,
)

TARGET = "aoti"


class AotiSession(EngineSession):
    """A component as packages of AOTInductor."""

    target = TARGET

    def __init__(self, bundle: Bundle, component: str, *, threads: int | None = None) -> None:
        """Load ``component``; see :func:`wanx.runtime.sessions.open_session`.

        Raises:
            EnvironmentMismatchError: it was compiled for or on another machine.
            CorruptInputError: schedule and weights do not fit together.
            WanxError: the device has too little memory.
        """
        record = bundle.manifest.components[component]
        path = bundle.held(record.engines[TARGET])
        self.component, self.bundle = component, bundle
        schedule = read_schedule(path)
        _require_machine(schedule, bundle)
        require_trusted(bundle, component, TARGET)
        if threads is not None and schedule.device == "cpu":
            torch.set_num_threads(threads)
        device = "cpu" if schedule.device == "cpu" else "cuda"
        self._constants: dict[str, Tensor] = {}
        with self._explained(), ExitStack() as stack:
            opened = [
                stack.enter_context(safe_open(bundle.held(f), framework="pt", device=device))
                for f in record.weights
            ]
            files = {name: file for file in opened for name in file.keys()}  # noqa: SIM118
            self._runner = ScheduleRunner(
                schedule, path.parent, record.outputs, lambda s, w: self._weight(files, s, w)
            )

    @property
    def schedule(self) -> EngineSchedule:
        """The programs and steps that run."""
        return self._runner.schedule

    def bind(self, constants: Mapping[str, Array]) -> None:
        """Copy the arrays to the device."""
        self._constants |= {name: self._tensor(name, array) for name, array in constants.items()}
        self._runner.drop_graphs()

    def run(self, feeds: Mapping[str, Array], state: State | None = None) -> dict[str, Array]:
        """Run the programs; see :meth:`Session.run`."""
        with self._explained():
            inputs = {name: self._tensor(name, array) for name, array in feeds.items()}
            values = self._constants | inputs
            if state is None:
                results = self._runner.run(values, changing=inputs.keys())
            else:
                known = self._runner.schedule.input_dtypes
                results = self._runner.run(values | {n: v for n, v in state.items() if n in known})
            outputs = {}
            for name, value in results.items():
                if state is not None and name.endswith(NEXT):
                    state[name.removesuffix(NEXT)] = value
                else:
                    outputs[name] = value.float().cpu().numpy()
        return outputs

    def kernel_times(self, call: Callable[[], object]) -> list[KernelTime]:
        """Measure with PyTorch's profiler: kernels on a GPU, operators on the processor."""
        on_gpu = self._runner.device.type == "cuda"
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profile(activities=kinds) as profiler:
            call()
        times = []
        for event in profiler.key_averages():
            spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            if spent and (not on_gpu or event.device_type.name != "CPU"):
                times.append(
                    KernelTime(program="", name=event.key, calls=event.count, seconds=spent / 1e6)
                )
        return times

    def close(self) -> None:
        """Free programs and weights."""
        self._constants.clear()
        self._runner.close()

    def _tensor(self, name: str, array: Array) -> Tensor:
        value = torch.from_numpy(np.ascontiguousarray(array))
        return value.to(self._runner.device, TYPES[self._runner.schedule.input_dtypes[name]])

    def _weight(self, files: Mapping[str, Any], step: Step, weight: Weight) -> Tensor:
        names = [f"{step.prefix}{source}" for source in weight.sources]
        if missing := [name for name in names if name not in files]:
            raise missing_weight(self.component, missing[0])
        parts = [files[name].get_tensor(name).to(TYPES[weight.dtype]) for name in names]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        if whole.numel() != math.prod(weight.shape):
            raise misshaped_weight(self.component, names[0], whole.shape, weight.shape)
        return whole.reshape(weight.shape)


def _require_machine(schedule: EngineSchedule, bundle: Bundle) -> None:
    """Refuse what was compiled for another GPU, or by another PyTorch.

    Raises:
        EnvironmentMismatchError: says how to build it for this machine.
    """
    here = "cpu"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        here = f"sm{major}{minor}"
    compiler = f"torch {torch.__version__}"
    problem = None
    if schedule.compiler != compiler:
        problem = f"by {schedule.compiler}, and this is {compiler}"
    elif schedule.device not in ("cpu", here):
        gpu = "has no GPU that PyTorch can use" if here == "cpu" else f"has {here}"
        problem = f"for {schedule.device}, and this machine {gpu}"
    if problem:
        raise EnvironmentMismatchError(
            f"the engines of {bundle.root} were built {problem}: run "
            f"`{bundle.build_command(TARGET)}`"
        )
