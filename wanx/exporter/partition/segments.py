"""Partition of a component into segments: programs compiled once, and run with other weights.

All blocks of a network are alike but for their weights. So a segment takes its weights as inputs,
and a network of 40 blocks is one program for its entry, one for each kind of block, and one for its
end. What is compiled stays small, holds no weights, and takes seconds instead of minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from wanx.bundle.engine_schedule import InputType, Step, Weight
from wanx.config.number_formats import GRAPH_INPUTS, WEIGHTS
from wanx.exporter.components import GraphInput
from wanx.kernels.number_formats import FORMATS

Parameters = list[tuple[str, nn.Parameter]]
STORED = {dtype: row.safetensors for dtype, row in FORMATS.items() if row in WEIGHTS}
_INPUTS = {dtype: row.safetensors for dtype, row in FORMATS.items() if row in GRAPH_INPUTS}


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One program.

    Attributes:
        name: of the program.
        module: holds the parameters, without storage, under their names in the weight files.
        call: of ``module`` and the inputs in their order; gives one tensor for each output.
        inputs: what a program takes before its weights; batch and other sizes may be axes.
        outputs: names of what it gives.
        sources: for a parameter that holds several tensors of the files, their names.
    """

    name: str
    module: nn.Module
    call: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[GraphInput, ...]
    outputs: tuple[str, ...]
    sources: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def parameters(self) -> Parameters:
        """Weights, in the order in which a program takes them."""
        return list(self.module.named_parameters())

    @property
    def weights(self) -> tuple[Weight, ...]:
        """Weights as the schedule records them."""
        return tuple(
            Weight(
                sources=self.sources.get(name, (name,)),
                dtype=STORED[parameter.dtype],
                shape=tuple(parameter.shape),
            )
            for name, parameter in self.parameters
        )

    @property
    def structure(self) -> tuple[Any, ...]:
        """Equal for segments that one program serves."""
        facts = ((n, tuple(p.shape), p.dtype) for n, p in self.parameters)
        return (self.name, tuple(item.name for item in self.inputs), *facts)


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A component as segments by name, the steps that run them, and the sizes to trace with."""

    segments: dict[str, Segment]
    steps: tuple[Step, ...]
    axes: dict[str, int]

    @property
    def input_dtypes(self) -> dict[str, InputType]:
        """The dtype of each input that no step produces."""
        return {name: _INPUTS[item.dtype] for name, item in self._graph_inputs().items()}

    @property
    def batched(self) -> tuple[str, ...]:
        """Inputs of the graph whose first axis is the batch."""
        return tuple(n for n, item in self._graph_inputs().items() if item.shape[:1] == ("B",))

    def _graph_inputs(self) -> dict[str, GraphInput]:
        produced: set[str] = set()
        graph_inputs: dict[str, GraphInput] = {}
        for step in self.steps:
            for name, item in zip(step.inputs, self.segments[step.program].inputs, strict=True):
                if name not in produced:
                    graph_inputs.setdefault(name, item)
            produced.update(step.outputs)
        return graph_inputs


class PartitionBuilder:
    """Collects steps, and one segment for each structure among them."""

    def __init__(self, axes: dict[str, int]) -> None:
        self._segments: dict[str, Segment] = {}
        self._known: dict[tuple[Any, ...], str] = {}
        self._steps: list[Step] = []
        self._axes = axes

    def add(
        self,
        segment: Segment,
        prefix: str = "",
        *,
        inputs: tuple[str, ...] | None = None,
        outputs: tuple[str, ...] | None = None,
    ) -> None:
        """Run ``segment`` next; its inputs and outputs may have other names in the schedule."""
        name = self._known.get(segment.structure)
        if name is None:
            same = sum(other.startswith(segment.name) for other in self._segments)
            name = f"{segment.name}_{same + 1}" if same else segment.name
            self._known[segment.structure] = name
            self._segments[name] = segment
        step = Step(
            program=name,
            prefix=prefix,
            inputs=inputs or tuple(item.name for item in segment.inputs),
            outputs=outputs or segment.outputs,
        )
        self._steps.append(step)

    def finish(self) -> Partition:
        """Partition of all that was added."""
        return Partition(segments=self._segments, steps=tuple(self._steps), axes=self._axes)
