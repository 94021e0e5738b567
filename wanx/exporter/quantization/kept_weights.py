"""8-bit floats of a checkpoint that a bundle keeps as they are, with their scales.

Quantising them anew would round a second time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wanx.checkpoints.tensors.float8 import E4M3, Float8Tensor
from wanx.checkpoints.tensors.source import CHUNK_BYTES, TensorSource
from wanx.checkpoints.weights import ComponentWeights
from wanx.config.number_formats import FP8
from wanx.exporter.quantization.recipe import Recipe, smoothing_of
from wanx.exporter.quantization.scheme import QuantizeOptions, Scheme

_log = logging.getLogger("wanx.exporter")
_MAGNITUDE, _NAN = 0x7F, 0x7F  # of e4m3fn: bits without the sign, and all of them


@dataclass(frozen=True, kw_only=True)
class KeptWeight(TensorSource):
    """A weight ``[N, K]`` whose 8-bit numbers are those of the checkpoint.

    Attributes:
        codes: the numbers.
        scale: fp32 ``[N]``, or a scalar for all rows.
    """

    codes: TensorSource
    scale: Tensor

    @property
    def position(self) -> int:
        """Place of the numbers."""
        return self.codes.position

    def iter_bytes(self, chunk: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """Yield the numbers, refusing NaN."""
        for piece in self.codes.iter_bytes(chunk):
            if ((np.frombuffer(piece, np.uint8) & _MAGNITUDE) == _NAN).any():
                raise self.codes.not_finite()
            yield piece

    def iter_converted(self, dtype: str, chunk: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """Yield the numbers; ``dtype`` can be no other."""
        assert dtype == self.dtype, f"{self.name} is {self.dtype}, not {dtype}"
        yield from self.iter_bytes(chunk)

    def numbers(self) -> Tensor:
        """All numbers, e4m3 ``[N, K]``."""
        data = bytearray()
        for piece in self.iter_bytes():  # each is valid until the next
            data += piece
        return torch.frombuffer(data, dtype=torch.float8_e4m3fn).view(self.shape)


def kept_weight(
    source: TensorSource, scheme: Scheme, options: QuantizeOptions
) -> KeptWeight | None:
    """A weight of a checkpoint as a bundle can keep it; None where it has to be quantised.

    That is so unless both are e4m3, with a positive scale for all rows, or one for each where the
    bundle has as many.
    """
    if scheme.stored != FP8.safetensors or not isinstance(source, Float8Tensor):
        return None
    if source.codes.dtype != E4M3 or len(source.shape) != 2:
        return None
    scales = np.ones(1) if source.scale is None else source.scales()
    per_tensor = options.weight_scale == "tensor"
    if (len(scales) > 1 and per_tensor) or not (scales > 0).all():
        return None
    scale = torch.from_numpy(scales.astype(np.float32))
    scale = scale.reshape(()) if per_tensor else scale.expand(source.shape[0]).contiguous()
    return KeptWeight(
        name=source.name, dtype=scheme.stored, shape=source.shape, nbytes=source.codes.nbytes,
        file=source.file, codes=source.codes, scale=scale,
    )  # fmt: skip


def kept_weights(weights: ComponentWeights, recipe: Recipe) -> dict[str, KeptWeight]:
    """Weights of a recipe that a bundle keeps as the checkpoint has them, by name."""
    found = {}
    for name in sorted(recipe.weights):
        vector = smoothing_of(name.removesuffix(".weight"))
        if vector is None or vector not in recipe.smooth:
            kept = kept_weight(weights.tensors[name], recipe.scheme, recipe.options)
            if kept is not None:
                found[name] = kept
    return found


def say_what_is_kept(weights: ComponentWeights, recipe: Recipe, kept: int) -> None:
    """Log how many of a checkpoint's 8-bit weights are kept, and how many are rounded again."""
    eight_bit = sum(isinstance(weights.tensors[name], Float8Tensor) for name in recipe.weights)
    if kept:
        _log.info("%s: %d weights keep the 8-bit floats of the source", weights.component, kept)
    if eight_bit > kept:
        _log.info(
            "%s: %d weights are 8-bit floats in the source and quantised anew to %s, which rounds "
            "them twice", weights.component, eight_bit - kept, recipe.scheme.name,
        )  # fmt: skip
