"""The programs of a plan with their weights: tensors in, tensors out, on one device."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from torch import Tensor

from wanx.bundle.engine_schedule import Plan, Step, Weight
from wanx.config.number_formats import GRAPH_INPUTS
from wanx.runtime.sessions.engine_session import MOST_SHAPES, WARM_UPS, last_use

TYPES = {row.safetensors: getattr(torch, row.torch) for row in GRAPH_INPUTS}
Values = Mapping[str, Tensor]
_log = logging.getLogger("wanx.runtime")


class Engine:
    """A loaded plan.

    On a GPU the programs of one shape of inputs become one CUDA graph at its third run: launching
    thousands of small kernels one by one would keep a GPU waiting at small sizes.
    ``WANX_CUDA_GRAPHS=0`` turns that off.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        outputs: Sequence[str],
        weight: Callable[[Step, Weight], Tensor],
    ) -> None:
        """Load programs and weights.

        Args:
            plan: what runs.
            folder: where its programs are.
            outputs: the values to return.
            weight: gives a tensor on :attr:`device` of the type and shape that a step wants.
        """
        self.plan = plan
        self.device = torch.device("cpu" if plan.device == "cpu" else "cuda")
        self._outputs = outputs
        self._last_use = last_use(plan, outputs)
        self._programs = {
            name: torch._inductor.aoti_load_package(str(folder / program.file))
            for name, program in plan.programs.items()
        }
        self._weights = [
            [weight(step, wanted) for wanted in plan.programs[step.program].weights]
            for step in plan.steps
        ]
        self._records = self.device.type == "cuda" and os.environ.get("WANX_CUDA_GRAPHS") != "0"
        self._seen: dict[tuple[Any, ...], int] = {}
        self._recorded: dict[tuple[Any, ...], tuple[Any, Values, dict[str, Tensor]]] = {}

    def run(self, values: Values, changing: Collection[str] = ()) -> dict[str, Tensor]:
        """Run all steps.

        Args:
            values: the inputs of the plan, contiguous; those with a batch may have one for all.
            changing: inputs that are not the same at each run of a shape; where there are any, the
                results are overwritten by the next run. Without them nothing is recorded.
        """
        values = self._with_batch(values)
        if not self._records or not changing:
            return self._run(values)
        shape = tuple((name, tuple(value.shape)) for name, value in sorted(values.items()))
        count = self._seen[shape] = self._seen.get(shape, 0) + 1
        if count <= WARM_UPS:
            return self._run(values)
        if shape not in self._recorded and not self._record(shape, values):
            return self._run(values)
        graph, held, outputs = self._recorded[shape]
        for name in changing:
            held[name].copy_(values[name])
        graph.replay()
        return outputs

    def _record(self, shape: tuple[Any, ...], values: Values) -> bool:
        """Record the programs on these inputs; they may stay as they are where that fails."""
        if len(self._recorded) == MOST_SHAPES:
            self._recorded.clear()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                outputs = self._run(values)
        except RuntimeError as error:  # too little memory, or a kernel that cannot be recorded
            torch.cuda.synchronize()
            self._records = False
            _log.warning("programs run one by one, as recording them failed: %s", error)
            return False
        self._recorded[shape] = graph, values, outputs
        return True

    def forget(self) -> None:
        """Drop what was recorded, because an input that was not changing has changed."""
        self._seen.clear()
        self._recorded.clear()

    def close(self) -> None:
        """Free everything."""
        self.forget()
        self._programs.clear()
        self._weights.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _with_batch(self, values: Values) -> Values:
        batched = {name: values[name] for name in self.plan.batched}
        batch = max((value.shape[0] for value in batched.values()), default=1)
        return {**values} | {
            name: value.expand(batch, *value.shape[1:]).contiguous()
            for name, value in batched.items()
            if value.shape[0] != batch
        }

    def _run(self, given: Values) -> dict[str, Tensor]:
        values = {**given}
        for step, weights, done in zip(self.plan.steps, self._weights, self._last_use, strict=True):
            arguments = [values[name] for name in step.inputs]
            made = self._programs[step.program](*arguments, *weights)
            # A program reads its inputs as dense, whatever strides they have.
            dense = (value.contiguous() for value in made)
            values |= dict(zip(step.outputs, dense, strict=True))
            for name in done:
                del values[name]
        return {name: values[name] for name in self._outputs}
