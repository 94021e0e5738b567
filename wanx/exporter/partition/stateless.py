"""A segment as a function of its inputs and its weights, traced."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from wanx.exporter.components import GraphInput, split_axis
from wanx.exporter.partition.segments import Segment


class StatelessSegment(nn.Module):
    """A segment whose weights are its last arguments. Its module is hidden from the tracer."""

    def __init__(self, segment: Segment, device: torch.device) -> None:
        super().__init__()
        self._segment = segment
        self._names = [name for name, _ in segment.parameters]
        self._hidden = (segment.module,)
        buffers = segment.module.named_buffers()
        self._constants = {name: value.to(device) for name, value in buffers}

    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """Run the segment."""
        count = len(self._segment.inputs)
        weights = dict(zip(self._names, arguments[count:], strict=True))
        (module,) = self._hidden
        caller = _SegmentCall(module, self._segment.call)
        state = {f"module.{n}": t for n, t in (weights | self._constants).items()}
        out: tuple[Tensor, ...] = torch.func.functional_call(caller, state, arguments[:count])
        return out


class _SegmentCall(nn.Module):
    def __init__(self, module: nn.Module, call: Callable[..., tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.module, self._call = module, call

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self._call(self.module, *inputs)


def export_segment(
    segment: Segment, axes: Mapping[str, int], device: torch.device
) -> torch.export.ExportedProgram:
    """Trace a segment without its weights; they are its last inputs.

    Args:
        segment: from :func:`wanx.exporter.partition.partition.cut`.
        axes: sizes to trace with; those of an axis called B may be 1 later.
        device: that it is traced for.
    """
    functional = StatelessSegment(segment, device).eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        shapes = [_dynamic_axes(item, axes) for item in segment.inputs]
        shapes += [None] * len(segment.parameters)
        return torch.export.export(
            functional, example_arguments(segment, axes, device),
            dynamic_shapes={"arguments": tuple(shapes)}, strict=False,
        )  # fmt: skip


def example_arguments(
    segment: Segment, axes: Mapping[str, int], device: torch.device
) -> tuple[Tensor, ...]:
    """Inputs and weights of the sizes to trace with; fake where that is the mode."""
    inputs = [item.example(axes, device) for item in segment.inputs]
    weights = [torch.empty(p.shape, dtype=p.dtype, device=device) for _, p in segment.parameters]
    return (*inputs, *weights)


def _dynamic_axes(item: GraphInput, axes: Mapping[str, int]) -> dict[int, object] | None:
    dims = {axis: torch.export.Dim(axis, min=1 if axis == "B" else None) for axis in axes}
    dynamic: dict[int, object] = {}
    for index, size in enumerate(item.shape):
        if isinstance(size, str):
            factor, axis = split_axis(size)
            dynamic[index] = dims[axis] if factor == 1 else factor * dims[axis]
    return dynamic or None
