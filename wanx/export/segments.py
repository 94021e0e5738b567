"""A component cut into segments: programs that are compiled once and run with other weights.

All blocks of a network are alike but for their weights. So a segment takes its weights as inputs,
and a network of 40 blocks is one program for its entry, one for each kind of block, and one for its
end. What is compiled stays small, holds no weights, and takes seconds instead of minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from wanx.config import DiTConfig
from wanx.engine_plan import Step
from wanx.export.components import ComponentSpec, GraphInput
from wanx.models.dit import Block, WanDiT
from wanx.models.fused_dit import FusedBlock
from wanx.models.image_encoder import ImageEncoder
from wanx.models.text_encoder import UMT5Encoder
from wanx.models.vae import WanVAE

Parameters = list[tuple[str, nn.Parameter]]


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
        """What the weights are, in the order in which a program takes them."""
        return list(self.module.named_parameters())

    @property
    def structure(self) -> tuple[Any, ...]:
        """Equal for segments that one program serves."""
        facts = ((n, tuple(p.shape), p.dtype) for n, p in self.parameters)
        return (self.name, tuple(item.name for item in self.inputs), *facts)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A component as segments by name, the steps that run them, and the sizes to trace with."""

    segments: dict[str, Segment]
    steps: tuple[Step, ...]
    axes: dict[str, int]


class _Cutter:
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
        """Run ``segment`` next; what it is given and gives may have other names in the plan."""
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

    def finish(self) -> Cut:
        return Cut(segments=self._segments, steps=tuple(self._steps), axes=self._axes)


def cut(spec: ComponentSpec, dtype: torch.dtype) -> Cut:
    """Cut a component, as it is or with 8-bit layers, into segments that compute in ``dtype``."""
    with torch.device("meta"), _default_dtype(dtype):
        module = spec.module().eval().requires_grad_(False)
        match module:
            case WanDiT():
                return _cut_dit(module, spec, dtype)
            case UMT5Encoder():
                return _cut_text_encoder(module, spec, dtype)
            case ImageEncoder():
                return _cut_image_encoder(module, spec, dtype)
            case WanVAE():
                _halve(module, "encoder" if "encoder" in spec.name else "decoder")
    return _whole(module, spec)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _halve(vae: WanVAE, kept: str) -> None:
    """Leave out the weights that one direction does not read."""
    unused = ("decoder", "conv2") if kept == "encoder" else ("encoder", "conv1")
    for name in unused:
        delattr(vae, name)


def _whole(module: nn.Module, spec: ComponentSpec) -> Cut:
    """One segment: the convolutions of a VAE differ from layer to layer."""

    def call(module: nn.Module, *inputs: Tensor) -> tuple[Tensor, ...]:
        count = len(spec.inputs)
        given = (*inputs[:count], list(inputs[count:])) if spec.caches else inputs
        out: tuple[Tensor, ...] = module(*given)
        return out

    cutter = _Cutter(spec.axes)
    cutter.add(
        Segment(
            name=spec.name, module=module, call=call, inputs=(*spec.inputs, *spec.caches),
            outputs=spec.outputs,
        )
    )  # fmt: skip
    return cutter.finish()


def _cut_text_encoder(model: UMT5Encoder, spec: ComponentSpec, dtype: torch.dtype) -> Cut:
    cutter = _Cutter(spec.axes)
    table, blocks, norm = model.token_embedding, model.blocks, model.norm
    x = GraphInput(name="x", shape=(1, "n", norm.weight.shape[0]), dtype=dtype)
    cutter.add(
        Segment(
            name="embed", module=table, call=lambda m, ids: (m(ids).to(dtype),),
            inputs=spec.inputs, outputs=("x",),
        ),
        "token_embedding.",
    )  # fmt: skip
    for index, block in enumerate(blocks):
        segment = Segment(
            name="block", module=block, call=lambda m, x: (m(x, None),), inputs=(x,),
            outputs=("x",),
        )  # fmt: skip
        cutter.add(segment, f"blocks.{index}.")
    cutter.add(
        Segment(
            name="norm", module=norm, call=lambda m, x: (m(x).float(),), inputs=(x,),
            outputs=spec.outputs,
        ),
        "norm.",
    )  # fmt: skip
    return cutter.finish()


def _cut_image_encoder(model: ImageEncoder, spec: ComponentSpec, dtype: torch.dtype) -> Cut:
    cutter = _Cutter(spec.axes)
    blocks, model.transformer = model.transformer, nn.ModuleList()
    _, tokens, dim = model.pos_embedding.shape
    x = GraphInput(name="x", shape=(1, tokens, dim), dtype=dtype)
    cutter.add(
        Segment(
            name="embed", module=model, call=lambda m, pixels: (m(pixels.to(dtype)),),
            inputs=spec.inputs, outputs=("x",),
        )
    )  # fmt: skip
    for index, block in enumerate(blocks):
        last = index == len(blocks) - 1
        segment = Segment(
            name="last_block" if last else "block", module=block,
            call=(lambda m, x: (m(x).float(),)) if last else (lambda m, x: (m(x),)),
            inputs=(x,), outputs=spec.outputs if last else ("x",),
        )  # fmt: skip
        cutter.add(segment, f"transformer.{index}.")
    return cutter.finish()


def _cut_dit(model: WanDiT, spec: ComponentSpec, dtype: torch.dtype) -> Cut:
    config = model.config
    batched = tuple(
        item if item.name in ("rope_cos", "rope_sin", "vace_scale")
        else replace(item, shape=("B", *item.shape[1:]))
        for item in spec.inputs
    )  # fmt: skip
    graph = {item.name: item for item in batched}
    values = _stream(config, dtype) | {name: graph[name] for name in ("rope_cos", "rope_sin")}
    blocks, model.blocks = _blocks(model.blocks), nn.ModuleList()
    control: list[Block] = []
    if config.vace_layers:
        control, model.vace_blocks = _blocks(model.vace_blocks), nn.ModuleList()
    head = model.head
    del model.head
    cutter = _Cutter({"B": 2, **spec.axes})
    cutter.add(_entry(model, graph))
    read = ["modulation", "rope_cos", "rope_sin", "text"]
    for index, block in enumerate(control):
        segment = _control_block(FusedBlock(block), [values[n] for n in ("x", *read)], values)
        names = ("control", "x", *read, f"scale_{index}")
        cutter.add(
            segment, f"vace_blocks.{index}.", inputs=names, outputs=("control", f"hint_{index}")
        )
    if config.image_dim is not None:
        read.append("image")
    for index, block in enumerate(blocks):
        hint = config.vace_layers.index(index) if index in config.vace_layers else None
        segment = _block(FusedBlock(block), [values[n] for n in ("x", *read)], hint is not None)
        names = ("x", *read, *(() if hint is None else (f"hint_{hint}",)))
        cutter.add(segment, f"blocks.{index}.", inputs=names)
    cutter.add(
        Segment(
            name="head", module=head, call=lambda m, x, time: (m(x, time),),
            inputs=(values["x"], values["time"]), outputs=spec.outputs,
        ),
        "head.",
    )  # fmt: skip
    return cutter.finish()


def _blocks(stack: nn.ModuleList) -> list[Block]:
    return [block for block in stack if isinstance(block, Block)]


def _stream(config: DiTConfig, dtype: torch.dtype) -> dict[str, GraphInput]:
    """What passes between the segments of a denoiser."""
    dim = config.dim
    values = {
        "x": GraphInput(name="x", shape=("B", "L", dim)),
        "time": GraphInput(name="time", shape=("B", dim)),
        "modulation": GraphInput(name="modulation", shape=("B", 6, dim)),
        "text": GraphInput(name="text", shape=("B", config.text_len, dim), dtype=dtype),
    }
    if config.image_dim is not None:
        shape = ("B", config.image_frames * config.image_tokens, dim)
        values["image"] = GraphInput(name="image", shape=shape, dtype=dtype)
    return values


def _entry(model: WanDiT, graph: Mapping[str, GraphInput]) -> Segment:
    """Everything before the first block. Weights of hints leave one by one."""
    inputs = [item for name, item in graph.items() if not name.startswith("rope")]
    names = [item.name for item in inputs]
    count = len(model.config.vace_layers)
    outputs = ["x", "time", "modulation", "text"]
    if "image_context" in names:
        outputs.append("image")
    if count:
        outputs += ["control", *(f"scale_{index}" for index in range(count))]

    def call(model: nn.Module, *values: Tensor) -> tuple[Tensor, ...]:
        assert isinstance(model, WanDiT)
        empty = values[0].new_empty(0)
        state = model.embed(**dict(zip(names, values, strict=True)), rope_cos=empty, rope_sin=empty)
        out = [state.x, state.time, state.modulation, state.text]
        out += [extra for extra in (state.image, state.control) if extra is not None]
        if state.scale is not None:
            out += [state.scale[index] * 1.0 for index in range(count)]
        return tuple(out)

    return Segment(
        name="embed", module=model, call=call, inputs=tuple(inputs), outputs=tuple(outputs)
    )


def _block(block: FusedBlock, inputs: list[GraphInput], hint: bool) -> Segment:
    def call(block: nn.Module, *values: Tensor) -> tuple[Tensor, ...]:
        return (block(*values),)

    def call_with_hint(block: nn.Module, *values: Tensor) -> tuple[Tensor, ...]:
        return (block(*values[:-1]) + values[-1],)

    extra = [replace(inputs[0], name="hint")] if hint else []
    return Segment(
        name="hinted_block" if hint else "block", module=block,
        call=call_with_hint if hint else call, inputs=(*inputs, *extra), outputs=("x",),
        sources=block.sources,
    )  # fmt: skip


def _control_block(
    block: FusedBlock, inputs: list[GraphInput], values: Mapping[str, GraphInput]
) -> Segment:
    """A block of the control branch: the branch, the stream, what blocks read, and a weight."""

    def call(block: nn.Module, control: Tensor, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        assert isinstance(block, FusedBlock)
        *read, scale = rest
        dtype = read[-1].dtype
        if block.before_proj is not None:
            control = block.before_proj(control.to(dtype)).float() + x
        control = block(control, *read)
        return control, block.after_proj(control.to(dtype)).float() * scale

    control = replace(values["x"], name="control")
    return Segment(
        name="control_block", module=block, call=call,
        inputs=(control, *inputs, GraphInput(name="scale", shape=())),
        outputs=("control", "hint"), sources=block.sources,
    )  # fmt: skip
