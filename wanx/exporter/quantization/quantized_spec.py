"""A component as a recipe has it: the same module, with 8-bit layers in the place of linears."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from wanx.bundle.manifest import Manifest
from wanx.exporter.components import ComponentSpec
from wanx.exporter.quantization.recipe import Recipe, recipe_from_manifest, shared_input
from wanx.exporter.quantization.scheme import WEIGHT_ONLY
from wanx.files.safetensors import read_header
from wanx.models.quantized import (
    DynamicQuantLinear,
    QuantAttentionOp,
    QuantEmbedding,
    QuantLinear,
    WeightOnlyLinear,
    replace_linears,
)


def quantized_spec(spec: ComponentSpec, recipe: Recipe) -> ComponentSpec:
    """Describe ``spec`` with 8-bit layers.

    A recipe that treats all blocks alike is traced from two of them, like the original; any other
    from all.
    """
    if spec.blocks and recipe.is_repeated(spec.stack, spec.blocks):
        return replace(spec, build=lambda blocks: quantize_module(spec.build(blocks), recipe))
    return replace(spec, blocks=0, build=lambda: quantize_module(spec.module(), recipe))


def quantized_like_bundle(spec: ComponentSpec, root: Path, manifest: Manifest) -> ComponentSpec:
    """Describe ``spec`` with the 8-bit layers that a bundle stores."""
    component = manifest.components[spec.name]
    if component.quantization is None:
        return spec
    shapes: dict[str, tuple[int, ...]] = {}
    for file in component.weights:
        shapes |= {name: ref.shape for name, ref in read_header(root / file).entries.items()}
    return quantized_spec(spec, recipe_from_manifest(component.quantization, shapes))


def quantize_module(module: nn.Module, recipe: Recipe) -> nn.Module:
    """Replace the layers of a recipe in place, all sizes and no numbers; return the module.

    Layers of the recipe that the module has not, because it was built with fewer blocks, are left
    out.
    """
    owners: dict[str, QuantLinear] = {}
    per_tensor = recipe.options.weight_scale == "tensor"
    dtype = recipe.scheme.dtype

    def make(name: str, linear: nn.Linear) -> nn.Module | None:
        sizes = linear.in_features, linear.out_features
        if name not in recipe.layers:
            return None
        if recipe.scheme.name == WEIGHT_ONLY:
            return WeightOnlyLinear(*sizes, bias=linear.bias is not None)
        if recipe.layers[name] is None:
            return DynamicQuantLinear(*sizes, per_tensor=per_tensor)
        owner = owners.get(shared_input(name))
        layer = QuantLinear(*sizes, dtype=dtype, per_tensor=per_tensor, same_input=owner)
        owners.setdefault(shared_input(name), layer)
        return layer

    replace_linears(module, make)
    for name in recipe.embeddings:
        table = module.get_submodule(name)
        assert isinstance(table, nn.Embedding)
        eight_bit = QuantEmbedding(table.num_embeddings, table.embedding_dim)
        module.set_submodule(name, eight_bit)
    present = {name for name, _ in module.named_modules()}
    for name in recipe.attention.keys() & present:
        heads = module.get_submodule(name).num_heads
        assert isinstance(heads, int)
        module.set_submodule(name, QuantAttentionOp(heads))
    for name, vector in recipe.smooth.items():
        block, _, attribute = name.rpartition(".")
        if block in present:
            parameter = nn.Parameter(torch.empty(vector.shape), requires_grad=False)
            setattr(module.get_submodule(block), attribute, parameter)
    return module
