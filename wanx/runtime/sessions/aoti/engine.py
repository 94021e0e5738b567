"""Schedule of AOTInductor packages with their weights: tensors in and out, on one device."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from torch import Tensor

from wanx.bundle.engine_schedule import EngineSchedule, Step, Weight
from wanx.config.number_formats import GRAPH_INPUTS
from wanx.runtime.sessions.engine_session import (
    MAX_CACHED_SHAPES,
    RUNS_BEFORE_CAPTURE,
    dead_after_step,
)

TYPES = {row.safetensors: getattr(torch, row.torch) for row in GRAPH_INPUTS}
Values = Mapping[str, Tensor]
_log = logging.getLogger("wanx.runtime")


class ScheduleRunner:
    """Runner of a schedule's steps.

    On a GPU the programs of one shape of inputs become one CUDA graph at its third run: launching
    thousands of small kernels one by one would keep a GPU waiting at small sizes.
    ``WANX_CUDA_GRAPHS=0`` turns that off.
    """

    def __init__(
        self,
        schedule: EngineSchedule,
        folder: Path,
        outputs: Sequence[str],
        weight: Callable[[Step, Weight], Tensor],
    ) -> None:
        """Load programs and weights.

        Args:
            schedule: what runs.
            folder: where its programs are.
            outputs: the values to return.
            weight: loads a tensor on :attr:`device`, of the type and shape that a step takes.
        """
        self.schedule = schedule
        self.device = torch.device("cpu" if schedule.device == "cpu" else "cuda")
        self._outputs = outputs
        self._dead_after_step = dead_after_step(schedule, outputs)
        self._programs = {
            name: torch._inductor.aoti_load_package(str(folder / program.file))
            for name, program in schedule.programs.items()
        }
        self._weights = [
            [weight(step, each) for each in schedule.programs[step.program].weights]
            for step in schedule.steps
        ]
        self._captures = self.device.type == "cuda" and os.environ.get("WANX_CUDA_GRAPHS") != "0"
        self._seen: dict[tuple[Any, ...], int] = {}
        self._graphs: dict[tuple[Any, ...], tuple[Any, Values, dict[str, Tensor]]] = {}

    def run(self, values: Values, changing: Collection[str] = ()) -> dict[str, Tensor]:
        """Run all steps.

        Args:
            values: the inputs of the schedule, contiguous; those with a batch may have one for all.
            changing: inputs that are not the same at each run of a shape; where there are any, the
                results are overwritten by the next run. Without them nothing is captured.
        """
        values = self._with_batch(values)
        if not self._captures or not changing:
            return self._run(values)
        shape = tuple((name, tuple(value.shape)) for name, value in sorted(values.items()))
        count = self._seen[shape] = self._seen.get(shape, 0) + 1
        if count <= RUNS_BEFORE_CAPTURE:
            return self._run(values)
        if shape not in self._graphs and not self._capture(shape, values):
            return self._run(values)
        graph, inputs, outputs = self._graphs[shape]
        for name in changing:
            inputs[name].copy_(values[name])
        graph.replay()
        return outputs

    def _capture(self, shape: tuple[Any, ...], values: Values) -> bool:
        """Capture the programs on these inputs; they run one by one where that fails."""
        if len(self._graphs) == MAX_CACHED_SHAPES:
            self._graphs.clear()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                outputs = self._run(values)
        except RuntimeError as error:  # too little memory, or a kernel that cannot be recorded
            torch.cuda.synchronize()
            self._captures = False
            _log.warning("programs run one by one, as recording them failed: %s", error)
            return False
        self._graphs[shape] = graph, values, outputs
        return True

    def drop_graphs(self) -> None:
        """Drop the captured graphs, because an input that was constant has changed."""
        self._seen.clear()
        self._graphs.clear()

    def close(self) -> None:
        """Free everything."""
        self.drop_graphs()
        self._programs.clear()
        self._weights.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _with_batch(self, values: Values) -> Values:
        batched = {name: values[name] for name in self.schedule.batched}
        batch = max((value.shape[0] for value in batched.values()), default=1)
        return {**values} | {
            name: value.expand(batch, *value.shape[1:]).contiguous()
            for name, value in batched.items()
            if value.shape[0] != batch
        }

    def _run(self, inputs: Values) -> dict[str, Tensor]:
        values = {**inputs}
        for step, weights, done in zip(
            self.schedule.steps, self._weights, self._dead_after_step, strict=True
        ):
            arguments = [values[name] for name in step.inputs]
            results = self._programs[step.program](*arguments, *weights)
            # A program reads its inputs as dense, whatever strides they have.
            dense = (value.contiguous() for value in results)
            values |= dict(zip(step.outputs, dense, strict=True))
            for name in done:
                del values[name]
        return {name: values[name] for name in self._outputs}
