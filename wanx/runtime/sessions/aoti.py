"""Sessions on AOTInductor packages; with :mod:`.aoti_engine` all of the runtime that needs PyTorch.

Weights go from the bundle's files to the device once, and stay there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from wanx.bundle import Bundle
from wanx.engine_plan import Plan, Step, Weight, read_plan
from wanx.errors import CorruptInputError, EnvironmentMismatchError, WanxError
from wanx.runtime.sessions.aoti_engine import TYPES, Engine
from wanx.runtime.sessions.base import NEXT, Array, Session, State
from wanx.trust import require_trusted

TARGET = "aoti"


class AotiSession(Session):
    """A component as compiled programs."""

    def __init__(self, bundle: Bundle, component: str, *, threads: int | None = None) -> None:
        """Load ``component``; see :func:`wanx.runtime.sessions.open_session`.

        Raises:
            EnvironmentMismatchError: it was compiled for or on another machine.
            CorruptInputError: plan and weights do not fit together.
            WanxError: the device has too little memory.
        """
        record = bundle.manifest.components[component]
        path = bundle.root / record.engines[TARGET]
        self._name = component
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

    def run_each(self, feeds: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
        """Run on each of ``feeds``, as one batch where building found that to be faster."""
        if len(feeds) < 2 or feeds[0]["tokens"].shape[1] > self._engine.plan.batch_limit:
            return super().run_each(feeds)
        made = self.run({name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]})
        return [
            {name: value[index : index + 1] for name, value in made.items()}
            for index in range(len(feeds))
        ]

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
            raise CorruptInputError(
                f"the weights of {self._name} lack {missing[0]!r}, which its engine reads; "
                "export it again"
            )
        parts = [files[name].get_tensor(name).to(TYPES[weight.dtype]) for name in names]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        if whole.numel() != math.prod(weight.shape):
            raise CorruptInputError(
                f"{names[0]!r} is {list(whole.shape)} in the weights of {self._name}, its engine "
                f"wants {list(weight.shape)}; export it again"
            )
        return whole.reshape(weight.shape)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except WanxError:
            raise
        except Exception as error:
            text = " ".join(str(error).split())
            if "out of memory" in text or isinstance(error, MemoryError):
                raise WanxError(
                    f"not enough memory on the device for {self._name} ({text:.160}); choose a "
                    "smaller size or fewer frames, or export with --precision fp8"
                ) from error
            raise WanxError(
                f"the engine of {self._name} failed ({text:.240}); `wanx build --target aoti` "
                "makes it again, and --target cpu does without it"
            ) from error


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
