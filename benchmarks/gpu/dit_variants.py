"""Transformers that are compared, each as something that runs any number of blocks."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.plain_dit import BlockCall, PlainDiT
from benchmarks.gpu.random_dit import Weights
from wanx.bundle.engine_schedule import SCHEDULE, EngineSchedule, Step, Weight, read_schedule
from wanx.checkpoints.key_maps import DIT
from wanx.config.models import DiTConfig
from wanx.exporter.components import ComponentSpec
from wanx.exporter.partition.partition import partition
from wanx.exporter.partition.segments import Partition, Segment
from wanx.runtime.sessions.aoti.engine import TYPES, ScheduleRunner

# From the inputs of a branch and a number of blocks to the velocity, and the stream before the head
# where that can be had. Blocks beyond those that there are weights of run the same ones again.
DiTVariant = Callable[[Weights, int], tuple[Tensor, Tensor | None]]
Call = Callable[..., Sequence[Tensor]]
OUTPUTS = ("velocity", "x")


def plain(model: PlainDiT, blocks: Sequence[BlockCall]) -> DiTVariant:
    """PyTorch's own operators; ``blocks`` are those of ``model``, or compiled."""

    def run(values: Weights, count: int) -> tuple[Tensor, Tensor]:
        velocity, stream = model(values, [blocks[i % len(blocks)] for i in range(count)])
        return velocity, stream

    return run


class CompiledDiT:
    """Ours: compiled programs, as an exported bundle runs them."""

    def __init__(self, folder: Path, weights: Weights, held: int) -> None:
        """Take the programs in ``folder``, and weights of ``held`` blocks by a bundle's names."""
        self._folder, self._weights, self._held = folder, weights, held
        self._schedule = read_schedule(folder / SCHEDULE)
        self._packed: dict[tuple[str, Weight], Tensor] = {}
        self._engines: dict[int, ScheduleRunner] = {}

    def __call__(self, values: Weights, count: int) -> tuple[Tensor, Tensor]:
        """Run it."""
        if count not in self._engines:
            schedule = schedule_with_blocks(self._schedule, count, self._held)
            self._engines[count] = ScheduleRunner(schedule, self._folder, OUTPUTS, self._weight)
        outputs = self._engines[count].run(values)
        return outputs["velocity"], outputs["x"]

    def _weight(self, step: Step, weight: Weight) -> Tensor:
        key = step.prefix, weight
        if key not in self._packed:
            names = [f"{step.prefix}{source}" for source in weight.sources]
            parts = [self._weights[name] for name in names]
            self._packed[key] = packed(parts, weight.shape, TYPES[weight.dtype])
        return self._packed[key]


def schedule_with_blocks(schedule: EngineSchedule, count: int, held: int) -> EngineSchedule:
    """The schedule with ``count`` blocks, whose weights are those of ``held`` in turn."""
    first, block, *_, last = schedule.steps
    repeated = (
        block.model_copy(update={"prefix": f"blocks.{index % held}."}) for index in range(count)
    )
    return schedule.model_copy(update={"steps": (first, *repeated, last)})


class EagerDiT:
    """Ours without a compiler: the same modules and kernels, one operator after the other."""

    def __init__(self, spec: ComponentSpec, dtype: torch.dtype, weights: Weights) -> None:
        """Take what would be compiled, and weights by the names of a bundle."""
        self._parts: Partition = partition(spec, dtype)
        self._weights = weights
        self._calls: dict[str, Call] = {}

    def __call__(self, values: Weights, count: int) -> tuple[Tensor, Tensor]:
        """Run it."""
        first, *blocks, last = self._parts.steps
        known = dict(values)
        for step in (first, *(blocks[i % len(blocks)] for i in range(count)), last):
            call = self._call(step)
            outputs = call(*(known[name] for name in step.inputs))
            known |= dict(zip(step.outputs, outputs, strict=True))
        return known["velocity"], known["x"]

    def _call(self, step: Step) -> Call:
        key = f"{step.program} {step.prefix}"
        if key not in self._calls:
            segment = self._parts.segments[step.program]
            self._calls[key] = bound(segment, step.prefix, self._weights)
        return self._calls[key]


def bound(segment: Segment, prefix: str, weights: Weights) -> Call:
    """A segment as PyTorch runs it, with its weights."""
    device = next(iter(weights.values())).device
    state = {name: buffer.to(device) for name, buffer in segment.module.named_buffers()}
    for name, parameter in segment.parameters:
        sources = segment.sources.get(name, (name,))
        parts = [weights[f"{prefix}{source}"] for source in sources]
        state[name] = packed(parts, tuple(parameter.shape), parameter.dtype)
    caller = _Caller(segment)
    held = {f"module.{name}": tensor for name, tensor in state.items()}

    def call(*inputs: Tensor) -> Sequence[Tensor]:
        out: Sequence[Tensor] = torch.func.functional_call(caller, held, inputs)
        return out

    return call


class _Caller(nn.Module):
    def __init__(self, segment: Segment) -> None:
        super().__init__()
        self.module, self._call = segment.module, segment.call

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self._call(self.module, *inputs)


def packed(parts: Sequence[Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Tensors one after the other along their first axis, as one of this shape and type."""
    assert sum(part.numel() for part in parts) == math.prod(shape)
    if len(parts) == 1:
        return parts[0].to(dtype).reshape(shape)
    whole = torch.empty(shape, dtype=dtype, device=parts[0].device)
    start = 0
    for part in parts:
        whole[start : start + len(part)].copy_(part)
        start += len(part)
    return whole


def diffusers_version() -> str | None:
    """Of the package, where it is installed."""
    return None if find_spec("diffusers") is None else version("diffusers")


class DiffusersDiT:
    """The transformer of diffusers."""

    def __init__(self, config: DiTConfig, grid: tuple[int, int, int], weights: Weights) -> None:
        """Build it with the same weights, stored as its own loader would."""
        self._config, self._grid = config, grid
        build = importlib.import_module("diffusers").WanTransformer3DModel
        first = next(iter(weights.values()))
        with torch.device(first.device):
            model = build(
                num_attention_heads=config.num_heads,
                attention_head_dim=config.head_dim,
                in_channels=config.in_dim,
                out_channels=config.out_dim,
                text_dim=config.text_dim,
                freq_dim=config.freq_dim,
                ffn_dim=config.ffn_dim,
                num_layers=config.num_layers,
                cross_attn_norm=True,
                eps=config.eps,
            )
        wide = tuple(build._keep_in_fp32_modules or ())
        for name, parameter in model.named_parameters():
            original = DIT.to_original(name)
            assert original is not None
            dtype = torch.float32 if any(part in name for part in wide) else first.dtype
            parameter.data = weights[original].to(dtype).reshape(parameter.shape)
        self._model: Any = model.eval().requires_grad_(False)
        self._blocks, self._dtype = list(model.blocks), first.dtype

    def __call__(self, values: Weights, count: int) -> tuple[Tensor, None]:
        """Run it; the velocity comes as tokens."""
        config, (t, h, w) = self._config, self._grid
        pt, ph, pw = config.patch_size
        blocks = [self._blocks[i % len(self._blocks)] for i in range(count)]
        self._model.blocks = nn.ModuleList(blocks)
        cells = values["tokens"].view(1, t, h, w, config.in_dim, pt, ph, pw)
        latent = cells.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(
            1, config.in_dim, t * pt, h * ph, w * pw
        )
        (out,) = self._model(
            latent.to(self._dtype),
            values["timestep"],
            values["context"].to(self._dtype),
            return_dict=False,
        )
        cells = out.view(1, config.out_dim, t, pt, h, ph, w, pw).permute(0, 2, 4, 6, 3, 5, 7, 1)
        return cells.reshape(1, t * h * w, config.velocity_dim).float(), None
