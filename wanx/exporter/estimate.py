"""Estimate of an export's sizes, memory and time."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wanx.config.number_formats import BF16, BY_SAFETENSORS, FP32
from wanx.exporter.component_groups import component_groups
from wanx.exporter.golden import known_golden
from wanx.exporter.graph.cache import GraphCache
from wanx.exporter.options import ResolvedExport
from wanx.runtime.sizes import latent_shape

if TYPE_CHECKING:
    from wanx.exporter.quantization.recipe import Recipe

# Measured on two cores, of an AMD EPYC of the Zen 4 generation or an Intel Xeon with AMX.
_SECONDS_FIXED = 2.0
_SECONDS_PYTORCH = 4.0  # to import it and what traces
_SECONDS_PER_TRACE = 4.0
_SECONDS_PER_VACE_BLOCK = 0.6  # a DiT with hints is traced whole, any other from two blocks
_BYTES_PER_SECOND = 400e6
_OPERATIONS_PER_SECOND = 150e9  # of the streamed denoiser in fp32
_GRAPH_BYTES = 700_000_000
_GRAPH_BYTES_PER_BLOCK = 6_000_000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Sizes in bytes and time in seconds.

    Attributes:
        weight_bytes: what each group of weights takes in the bundle.
        bundle_bytes: the whole bundle.
        peak_memory_bytes: memory of the process; weights never count, they pass in chunks.
        seconds: duration on a small machine, calibration included.
        calibration_seconds: what calibrating, or recording golden steps, takes of that.
    """

    weight_bytes: dict[str, int]
    bundle_bytes: int
    peak_memory_bytes: int
    seconds: float
    calibration_seconds: float


def estimate(resolved: ResolvedExport, cache: GraphCache | None = None) -> Estimate:
    """Estimate an export from the sizes of its weights and the depth of its networks.

    Args:
        resolved: the export.
        cache: knows which graphs need no trace; None takes the usual one.
    """
    config = resolved.checkpoint.config
    weights = {group: resolved.weight_bytes(group) for group in resolved.checkpoint.components}
    blocks = config.dit.num_layers + len(config.dit.vace_layers) + config.text_encoder.num_layers
    if config.image_encoder is not None:
        blocks += config.image_encoder.used_layers
    traced = _traced(resolved, cache or GraphCache())
    tracing = len(traced) * _SECONDS_PER_TRACE
    if "dit" in traced and config.dit.vace_layers:
        tracing += blocks * _SECONDS_PER_VACE_BLOCK
    records = bool(resolved.runs) and (
        "dit" in resolved.eight_bit or known_golden(resolved) is None
    )
    calibration = _operations(resolved) / _OPERATIONS_PER_SECOND if records else 0.0
    pytorch = _SECONDS_PYTORCH if traced or records or resolved.scheme is not None else 0.0
    total = sum(weights.values())
    return Estimate(
        weight_bytes=weights,
        # Graphs and the tokenizer, which is 17 MB for umT5-xxl.
        bundle_bytes=total + (32 << 20),
        peak_memory_bytes=_GRAPH_BYTES + blocks * _GRAPH_BYTES_PER_BLOCK,
        seconds=_SECONDS_FIXED + pytorch + tracing + total / _BYTES_PER_SECOND + calibration,
        calibration_seconds=calibration,
    )


def _traced(resolved: ResolvedExport, cache: GraphCache) -> list[str]:
    """Components whose graph is not known, once for each type of it.

    Which layers calibration keeps high is not known either: none is taken for one.
    """
    config = resolved.checkpoint.config
    recipes: dict[str, Recipe | None] = dict.fromkeys(component_groups(config))
    if resolved.scheme is not None:
        from wanx.exporter.quantization import recipe

        quantize = resolved.options.quantize
        layers, _ = recipe.dit_candidates(config.dit, quantize)
        scales = dict.fromkeys(layers, 1.0 if quantize.activation_scale == "static" else None)
        quantized = {
            "dit": recipe.Recipe(scheme=resolved.scheme, options=quantize, layers=scales),
            "text_encoder": recipe.text_recipe(config.text_encoder),
        }
        recipes |= {name: quantized[name] for name in resolved.eight_bit}
    wanted = [(name, FP32.name) for name in recipes]
    if resolved.options.target == "cuda":  # its graphs compute in what most weights are stored in
        types = {group: _computes(resolved, group) for group in resolved.checkpoint.components}
        wanted += [
            (name, types[name]) for name in recipes if types.get(name, FP32.name) != FP32.name
        ]
    return [
        name
        for name, computes in wanted
        if not cache.has_graph(name, config, recipes[name], computes)
    ]


def _computes(resolved: ResolvedExport, group: str) -> str:
    """Type that the target ``cuda`` computes a group's networks in."""
    if group == "vae":
        return FP32.name
    if group in resolved.eight_bit:
        return BF16.name
    sizes: Counter[str] = Counter()
    for tensor in resolved.checkpoint.components[group].tensors.values():
        sizes[resolved.stored_type(group, tensor)] += tensor.nbytes
    return BY_SAFETENSORS[max(sizes, key=lambda dtype: sizes[dtype])].name


def _operations(resolved: ResolvedExport) -> int:
    """Additions and multiplications of the runs: two for each parameter and token."""
    config = resolved.checkpoint.config
    tokens = 0
    for run, _ in resolved.runs:
        _, times, rows, columns = latent_shape(run.width, run.height, run.frames, config.vae)
        length = times * rows * columns // config.dit.patch_volume
        tokens += length * run.forwards
    tensors = resolved.checkpoint.components["dit"].tensors.values()
    return 2 * tokens * sum(math.prod(tensor.shape) for tensor in tensors)
