"""Partition of each component into segments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from wanx.exporter.components import ComponentSpec, GraphInput
from wanx.exporter.partition.dit import partition_dit
from wanx.exporter.partition.segments import Partition, PartitionBuilder, Segment
from wanx.models.dit.model import WanDiT
from wanx.models.image_encoder import ImageEncoder
from wanx.models.text_encoder import UMT5Encoder
from wanx.models.vae import WanVAE


def partition(spec: ComponentSpec, dtype: torch.dtype) -> Partition:
    """Cut a component, as it is or with 8-bit layers, into segments that compute in ``dtype``."""
    with torch.device("meta"), _default_dtype(dtype):
        module = spec.module().eval().requires_grad_(False)
        match module:
            case WanDiT():
                return partition_dit(module, spec, dtype)
            case UMT5Encoder():
                return _partition_text_encoder(module, spec, dtype)
            case ImageEncoder():
                return _partition_image_encoder(module, spec, dtype)
            case WanVAE():
                _drop_unused(module, spec.name.rpartition("_")[0])
    return _single_segment(module, spec, dtype)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


_UNUSED = {
    "vae_encoder_down": ("decoder", "conv1", "conv2", "encoder.middle", "encoder.head"),
    "vae_encoder_mid": ("decoder", "conv2", "encoder.conv1", "encoder.downsamples"),
    "vae_decoder_mid": ("encoder", "conv1", "decoder.upsamples", "decoder.head"),
    "vae_decoder_up": ("encoder", "conv1", "conv2", "decoder.conv1", "decoder.middle"),
}


def _drop_unused(vae: WanVAE, part: str) -> None:
    """Leave out the weights that a part does not read."""
    for name in _UNUSED[part]:
        owner, _, last = name.rpartition(".")
        delattr(vae.get_submodule(owner), last)


def _single_segment(module: nn.Module, spec: ComponentSpec, dtype: torch.dtype) -> Partition:
    """One segment: the convolutions of a VAE differ from layer to layer."""
    caches = tuple(replace(cache, dtype=dtype) for cache in spec.caches)

    def call(module: nn.Module, *inputs: Tensor) -> tuple[Tensor, ...]:
        count = len(spec.inputs)
        arguments = (*inputs[:count], list(inputs[count:])) if spec.caches else inputs
        out: tuple[Tensor, ...] = module(*arguments)
        return out

    builder = PartitionBuilder(spec.axes)
    builder.add(
        Segment(
            name=spec.name, module=module, call=call, inputs=(*spec.inputs, *caches),
            outputs=spec.outputs,
        )
    )  # fmt: skip
    return builder.finish()


def _partition_text_encoder(
    model: UMT5Encoder, spec: ComponentSpec, dtype: torch.dtype
) -> Partition:
    builder = PartitionBuilder(spec.axes)
    table, blocks, norm = model.token_embedding, model.blocks, model.norm
    x = GraphInput(name="x", shape=(1, "n", norm.weight.shape[0]), dtype=dtype)
    builder.add(
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
        builder.add(segment, f"blocks.{index}.")
    builder.add(
        Segment(
            name="norm", module=norm, call=lambda m, x: (m(x).float(),), inputs=(x,),
            outputs=spec.outputs,
        ),
        "norm.",
    )  # fmt: skip
    return builder.finish()


def _partition_image_encoder(
    model: ImageEncoder, spec: ComponentSpec, dtype: torch.dtype
) -> Partition:
    builder = PartitionBuilder(spec.axes)
    blocks, model.transformer = model.transformer, nn.ModuleList()
    _, tokens, dim = model.pos_embedding.shape
    x = GraphInput(name="x", shape=(1, tokens, dim), dtype=dtype)
    builder.add(
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
        builder.add(segment, f"transformer.{index}.")
    return builder.finish()
