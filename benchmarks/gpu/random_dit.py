"""Random weights and inputs of a transformer, and the same weights in 8 bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.context import BenchContext
from benchmarks.gpu.plain_dit import AttentionOp, PlainDiT
from wanx.config.models import DiTConfig
from wanx.config.number_formats import FP8
from wanx.exporter.quantization.recipe import Recipe, dit_candidates, shared_input
from wanx.exporter.quantization.scheme import SCHEMES, QuantizeOptions
from wanx.models.dit.model import WanDiT
from wanx.models.quantized import quantize_weight
from wanx.runtime.tokens import Triple, rope_tables

Weights = dict[str, Tensor]
# Weights of the norms of q and k: scores of this deviation make attention as sharp as a trained
# one's; with 1 it would be the mean of all values.
_SHARPNESS = 1.4


def random_weights(bench: BenchContext, config: DiTConfig, dtype: torch.dtype) -> Weights:
    """Weights by the names of the checkpoints, of a size that keeps the stream's."""
    with torch.device("meta"):
        model = WanDiT(config)
    return {name: _random(bench, name, p.shape).to(dtype) for name, p in model.named_parameters()}


def _random(bench: BenchContext, name: str, shape: torch.Size) -> Tensor:
    noise = bench.random(*shape)
    if name.endswith("modulation"):
        return 0.5 * noise
    if name.endswith("bias"):
        return 0.02 * noise
    if len(shape) == 1:
        return (_SHARPNESS if "norm_" in name else 1.0) + 0.1 * noise
    return noise / math.sqrt(shape[1])


def random_inputs(bench: BenchContext, config: DiTConfig, grid: Triple) -> tuple[Weights, Weights]:
    """Inputs of the two branches of a step with guidance: they differ in their text."""
    cos, sin = (
        torch.from_numpy(table).to(bench.device) for table in rope_tables(grid, config.rope_dims)
    )
    shared = {
        "tokens": bench.random(1, len(cos), config.token_dim),
        "timestep": torch.tensor([900.0], device=bench.device),
        "rope_cos": cos,
        "rope_sin": sin,
    }
    with_text, without = (
        shared | {"context": bench.random(1, config.text_len, config.text_dim)} for _ in range(2)
    )
    return with_text, without


def recipe_of(
    config: DiTConfig, attention: bool, amax: Mapping[str, float] | None = None
) -> Recipe:
    """Every layer that can be in fp8, with static scales.

    Args:
        config: of the transformer.
        attention: whether attention is, too.
        amax: the largest magnitude of each layer's input; without it scales are 1.
    """
    layers, _ = dit_candidates(config, QuantizeOptions())
    largest = FP8.largest

    def scale(name: str) -> float:
        return 1.0 if amax is None else amax[name] / largest

    attends = [f"blocks.{i}.self_attn.attend" for i in range(config.num_layers) if attention]
    return Recipe(
        scheme=SCHEMES["fp8"],
        options=QuantizeOptions(attention="fp8" if attention else "none"),
        layers={name: scale(name) for name in layers},
        attention={n: (scale(f"{n}.q"), scale(f"{n}.k"), scale(f"{n}.v")) for n in attends},
    )


def input_amax(model: PlainDiT, values: Weights) -> dict[str, float]:
    """Measure the largest magnitude of each linear's input and of each attention's q, k and v."""
    amax: dict[str, Tensor] = {}
    with _hooks(model, amax):
        model(values)
    return {name: float(value) for name, value in amax.items()}


@contextmanager
def _hooks(model: nn.Module, amax: dict[str, Tensor]) -> Iterator[None]:
    def note(names: tuple[str, ...], _: nn.Module, inputs: tuple[Any, ...]) -> None:
        for name, tensor in zip(names, inputs, strict=True):
            amax[name] = tensor.abs().amax().float()

    handles = []
    for name, module in model.named_modules():
        names: tuple[str, ...] = (name,)
        if isinstance(module, AttentionOp):
            names = (f"{name}.q", f"{name}.k", f"{name}.v")
        elif not isinstance(module, nn.Linear):
            continue
        hook: Callable[..., None] = partial(note, names)
        handles.append(module.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def quantized(weights: Weights, recipe: Recipe) -> Weights:
    """The weights as a recipe stores them, by the names of a bundle."""
    stored = dict(weights)
    device = next(iter(weights.values())).device

    def number(value: float) -> Tensor:
        return torch.tensor(value, device=device)

    for layer, input_scale in recipe.layers.items():
        name = f"{layer}.weight"
        stored[name], stored[f"{layer}.weight_scale"] = quantize_weight(
            weights[name], recipe.scheme.dtype
        )
        if input_scale is not None and shared_input(layer) == layer:
            stored[f"{layer}.input_scale"] = number(input_scale)
    for name, scales in recipe.attention.items():
        for part, scale in zip("qkv", scales, strict=True):
            stored[f"{name}.{part}_scale"] = number(scale)
    return stored


def with_blocks(config: DiTConfig, blocks: int) -> DiTConfig:
    """The same with fewer blocks, all of which are alike."""
    return replace(config, num_layers=blocks)
