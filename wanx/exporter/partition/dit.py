"""The denoiser cut into segments: embeddings, blocks, head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from wanx.config.models import DiTConfig
from wanx.exporter.components import ComponentSpec, GraphInput
from wanx.exporter.partition.segments import Partition, PartitionBuilder, Segment
from wanx.models.dit.block import Block
from wanx.models.dit.fused_block import FusedBlock
from wanx.models.dit.model import WanDiT


def partition_dit(model: WanDiT, spec: ComponentSpec, dtype: torch.dtype) -> Partition:
    """Cut a denoiser on the meta device, which is taken apart.

    See :func:`wanx.exporter.partition.partition.cut`.
    """
    config = model.config
    batched = tuple(
        item if item.name in ("rope_cos", "rope_sin", "vace_scale")
        else replace(item, shape=("B", *item.shape[1:]))
        for item in spec.inputs
    )  # fmt: skip
    graph = {item.name: item for item in batched}
    values = _boundary_values(config, dtype) | {
        name: graph[name] for name in ("rope_cos", "rope_sin")
    }
    blocks, model.blocks = _block_list(model.blocks), nn.ModuleList()
    control: list[Block] = []
    if config.vace_layers:
        control, model.vace_blocks = _block_list(model.vace_blocks), nn.ModuleList()
    head = model.head
    del model.head
    builder = PartitionBuilder({"B": 2, **spec.axes})
    builder.add(_embed_segment(model, graph))
    read = ["modulation", "rope_cos", "rope_sin", "text"]
    for index, block in enumerate(control):
        segment = _control_block_segment(
            FusedBlock(block), [values[n] for n in ("x", *read)], values
        )
        names = ("control", "x", *read, f"scale_{index}")
        builder.add(
            segment, f"vace_blocks.{index}.", inputs=names, outputs=("control", f"hint_{index}")
        )
    if config.image_dim is not None:
        read.append("image")
    for index, block in enumerate(blocks):
        hint = config.vace_layers.index(index) if index in config.vace_layers else None
        segment = _block_segment(
            FusedBlock(block), [values[n] for n in ("x", *read)], hint is not None
        )
        names = ("x", *read, *(() if hint is None else (f"hint_{hint}",)))
        builder.add(segment, f"blocks.{index}.", inputs=names)
    builder.add(
        Segment(
            name="head", module=head, call=lambda m, x, time: (m(x, time),),
            inputs=(values["x"], values["time"]), outputs=spec.outputs,
        ),
        "head.",
    )  # fmt: skip
    return builder.finish()


def _block_list(stack: nn.ModuleList) -> list[Block]:
    return [block for block in stack if isinstance(block, Block)]


def _boundary_values(config: DiTConfig, dtype: torch.dtype) -> dict[str, GraphInput]:
    """Values that pass between the segments of a denoiser."""
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


def _embed_segment(model: WanDiT, graph: Mapping[str, GraphInput]) -> Segment:
    """Embeddings before the first block; the weights of hints are outputs one by one."""
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


def _block_segment(block: FusedBlock, inputs: list[GraphInput], hint: bool) -> Segment:
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


def _control_block_segment(
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
