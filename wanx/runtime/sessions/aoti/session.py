"""Sessions on AOTInductor packages; with :mod:`.aoti_engine` all of the runtime that needs PyTorch.

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

from wanx.bundle.engine_schedule import Plan, Step, Weight, read_plan
from wanx.bundle.reader import Bundle
from wanx.bundle.trust import require_trusted
from wanx.errors import EnvironmentMismatchError
from wanx.runtime.sessions.aoti.engine import TYPES, Engine
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
            CorruptInputError: plan and weights do not fit together.
            WanxError: the device has too little memory.
        """
        record = bundle.manifest.components[component]
        path = bundle.root / record.engines[TARGET]
        self.component = component
        plan = read_plan(path)
        _require_machine(plan, bundle)
        require_trusted(bundle, component, TARGET)
        if threads is not None and plan.device == "cpu":
            torch.set_num_threads(threads)
        device = "cpu" if plan.device == "cpu" else "cuda"
        self._constants: dict[str, Tensor] = {}
        with self._explained(), ExitStack() as stack:
            opened = [
                stack.enter_context(safe_open(bundle.root / f, framework="pt", device=device))
                for f in record.weights
            ]
            files = {name: file for file in opened for name in file.keys()}  # noqa: SIM118
            self._engine = Engine(
                plan, path.parent, record.outputs, lambda s, w: self._weight(files, s, w)
            )

    @property
    def plan(self) -> Plan:
        """What runs."""
        return self._engine.plan

    def bind(self, constants: Mapping[str, Array]) -> None:
        """Copy the arrays to the device."""
        self._constants |= {name: self._tensor(name, array) for name, array in constants.items()}
        self._engine.forget()

    def run(self, feeds: Mapping[str, Array], state: State | None = None) -> dict[str, Array]:
        """Run the programs; see :meth:`Session.run`."""
        with self._explained():
            given = {name: self._tensor(name, array) for name, array in feeds.items()}
            values = self._constants | given
            if state is None:
                made = self._engine.run(values, changing=given.keys())
            else:
                known = self._engine.plan.types
                made = self._engine.run(values | {n: v for n, v in state.items() if n in known})
            outputs = {}
            for name, value in made.items():
                if state is not None and name.endswith(NEXT):
                    state[name.removesuffix(NEXT)] = value
                else:
                    outputs[name] = value.float().cpu().numpy()
        return outputs

    def kernel_times(self, call: Callable[[], object]) -> list[KernelTime]:
        """Measure with PyTorch's profiler: kernels on a GPU, operators on the processor."""
        on_gpu = self._engine.device.type == "cuda"
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profile(activities=kinds) as found:
            call()
        times = []
        for event in found.key_averages():
            spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            if spent and (not on_gpu or event.device_type.name != "CPU"):
                times.append(
                    KernelTime(program="", name=event.key, calls=event.count, seconds=spent / 1e6)
                )
        return times

    def close(self) -> None:
        """Free programs and weights."""
        self._constants.clear()
        self._engine.close()

    def _tensor(self, name: str, array: Array) -> Tensor:
        value = torch.from_numpy(np.ascontiguousarray(array))
        return value.to(self._engine.device, TYPES[self._engine.plan.types[name]])

    def _weight(self, files: Mapping[str, Any], step: Step, weight: Weight) -> Tensor:
        names = [f"{step.prefix}{source}" for source in weight.sources]
        if missing := [name for name in names if name not in files]:
            raise missing_weight(self.component, missing[0])
        parts = [files[name].get_tensor(name).to(TYPES[weight.dtype]) for name in names]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        if whole.numel() != math.prod(weight.shape):
            raise misshaped_weight(self.component, names[0], whole.shape, weight.shape)
        return whole.reshape(weight.shape)


def _require_machine(plan: Plan, bundle: Bundle) -> None:
    """Refuse what was compiled for another GPU, or by another PyTorch.

    Raises:
        EnvironmentMismatchError: says how to build it for this machine.
    """
    found = "cpu"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        found = f"sm{major}{minor}"
    compiler = f"torch {torch.__version__}"
    problem = None
    if plan.compiler != compiler:
        problem = f"by {plan.compiler}, and this is {compiler}"
    elif plan.device not in ("cpu", found):
        here = "has no GPU that PyTorch can use" if found == "cpu" else f"has {found}"
        problem = f"for {plan.device}, and this machine {here}"
    if problem:
        raise EnvironmentMismatchError(
            f"the engines of {bundle.root} were built {problem}: run `wanx build {bundle.root} "
            f"--target {TARGET}`"
        )
