"""Denoisers of each precision, and numbers for their segments."""

from __future__ import annotations

import functools

import onnx
import torch
from torch import Tensor

from tests.support.onnx_runs import TYPES
from wanx.config.models import DiTConfig
from wanx.exporter.components import ComponentSpec, dit_spec
from wanx.exporter.partition.segments import Segment
from wanx.exporter.quantization.quantized_spec import quantized_spec
from wanx.exporter.quantization.recipe import Recipe, dit_candidates
from wanx.exporter.quantization.scheme import SCHEMES, QuantizeOptions

KINDS = {"bf16": None, "int8": "int8", "fp8": "fp8", "rows": "fp8", "attention": "fp8"}


@functools.cache
def spec_of(config: DiTConfig, kind: str) -> ComponentSpec:
    spec, scheme = dit_spec(config), KINDS[kind]
    if scheme is None:
        return spec
    options = QuantizeOptions(
        activation_scale="dynamic" if kind == "rows" else "static",
        attention="fp8" if kind == "attention" else "none",
    )
    layers, _ = dit_candidates(config, options)
    attends = [f"blocks.{i}.self_attn.attend" for i in range(config.num_layers)]
    recipe = Recipe(
        scheme=SCHEMES[scheme], options=options,
        layers=dict.fromkeys(layers, None if kind == "rows" else 0.1),
        attention=dict.fromkeys(attends if kind == "attention" else [], (0.1, 0.1, 0.1)),
    )  # fmt: skip
    return quantized_spec(spec, recipe)


def values_of(segment: Segment, axes: dict[str, int]) -> list[Tensor]:
    """Random inputs and weights, of a size that 8 bits are made for."""
    generator = torch.Generator().manual_seed(0)
    values = []
    for item in segment.inputs:
        shape = item.example(axes, "meta").shape
        if item.dtype == torch.int64:
            values.append(torch.randint(0, 50, shape, generator=generator))
        else:
            values.append(torch.randn(shape, generator=generator).to(item.dtype))
    for name, parameter in segment.parameters:
        value = torch.randn(parameter.shape, generator=generator)
        if parameter.dtype == torch.int8:
            value = (value * 40).clamp(-127, 127)
        elif parameter.dtype == torch.float8_e4m3fn:
            value = value * 100
        elif name.endswith("weight_scale"):
            value = 1e-3 + 1e-4 * value.abs()
        elif name.endswith("_scale"):
            value = torch.full_like(value, 0.03)
        elif parameter.ndim > 1:
            value = value * parameter[0].numel() ** -0.5
        values.append(value.to(parameter.dtype))
    return values


def tensors_of(segment: Segment, weights: list[Tensor]) -> dict[str, onnx.TensorProto]:
    """Weights in ONNX, by their names."""
    return {
        name: onnx.TensorProto(
            data_type=TYPES[weight.dtype],
            dims=weight.shape,
            raw_data=weight.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
        for (name, _), weight in zip(segment.parameters, weights, strict=True)
    }
