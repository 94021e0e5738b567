"""Write a group of weights into the bundle with some of them in 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from wanx.exporter.options import ResolvedExport
from wanx.exporter.quantization.kept_weights import KeptWeight, say_what_is_kept
from wanx.exporter.quantization.quantize import quantize_weights, scale_tensors
from wanx.exporter.quantization.readback_weights import require_nearest
from wanx.exporter.quantization.recipe import Recipe
from wanx.exporter.weights import OnBytes, WrittenWeights, write_tensors
from wanx.files.safetensors import SafetensorsWriter


def write_quantized_weights(
    resolved: ResolvedExport, group: str, folder: Path, on_bytes: OnBytes, recipe: Recipe
) -> WrittenWeights:
    """Stream the weights of ``group`` into ``folder``, those of a recipe in 8 bits.

    The scales go into a file of their own, ``<group>-scales.safetensors``, because they are known
    last. See :func:`wanx.exporter.weights.write_tensors`.

    Raises:
        WanxError: as there; or what was written is not what the recipe says.
    """
    weights = resolved.checkpoint.components[group]
    sources = quantize_weights(weights, recipe)
    kept = [name for name, source in sources.items() if isinstance(source, KeptWeight)]
    say_what_is_kept(weights, recipe, len(kept))
    written = write_tensors(resolved, group, sources, folder, on_bytes)
    _write_scales(scale_tensors(sources, recipe), folder / f"{group}-scales.safetensors", written)
    require_nearest(weights.tensors, written.tensors, recipe, kept)
    written.kept = len(kept)
    return written


def _write_scales(scales: Mapping[str, Tensor], path: Path, written: WrittenWeights) -> None:
    header = [(name, "F32", tuple(scale.shape)) for name, scale in scales.items()]
    with SafetensorsWriter(path, header) as writer:
        for scale in scales.values():
            writer.write(scale.float().contiguous().numpy().tobytes())
    written.tensors |= writer.header.entries
    written.sha256[path] = writer.sha256
