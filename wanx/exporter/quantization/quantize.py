"""Weights to 8 bits while they are copied, a few rows in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wanx.checkpoints.tensors.source import TensorSource
from wanx.checkpoints.weights import ComponentWeights
from wanx.config import number_formats
from wanx.config.number_formats import BY_SAFETENSORS
from wanx.errors import CorruptInputError
from wanx.exporter.quantization.kept_weights import KeptWeight, kept_weights
from wanx.exporter.quantization.recipe import SHARED_INPUTS, Recipe, shared_input, smoothing_of
from wanx.exporter.quantization.scheme import Scheme
from wanx.files.floats import Chunk

FLOATS = {row.safetensors: getattr(torch, row.torch) for row in number_formats.FLOATS}
_PIECE = 1 << 20  # the rows worked on stay in a core's cache from the first pass to the last
TINY = 1e-30  # rows below it are stored as zeros, before their scale underflows


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor(TensorSource):
    """A weight ``[N, K]`` that is read in 16 or 32 bits and comes out in 8.

    Attributes:
        source: the weight as it is stored; ``name``, ``shape`` and ``file`` are its own.
        scheme: the number format.
        per_tensor: one scale for all rows.
        smooth: ``[K]`` in fp32; the weight is multiplied by it before.
        scale: fp32 ``[N]``, or a scalar for all rows; filled while the bytes go by.
    """

    source: TensorSource
    scheme: Scheme
    per_tensor: bool = False
    smooth: Tensor | None = None
    scale: Tensor

    @classmethod
    def of(
        cls,
        source: TensorSource,
        scheme: Scheme,
        *,
        per_tensor: bool = False,
        smooth: Tensor | None = None,
    ) -> QuantizedTensor:
        """Quantise ``source``.

        Raises:
            CorruptInputError: it has no two sides.
        """
        if len(source.shape) != 2:
            raise CorruptInputError(
                f"{source.file}: tensor {source.name!r} has shape {list(source.shape)}, and a "
                "weight to quantise has two sides; download the file again"
            )
        rows, columns = source.shape
        return cls(
            name=source.name, dtype=scheme.stored, shape=source.shape,
            nbytes=scheme.format.nbytes(rows * columns),
            file=source.file, source=source, scheme=scheme, per_tensor=per_tensor, smooth=smooth,
            scale=torch.empty(() if per_tensor else rows),
        )  # fmt: skip

    @property
    def position(self) -> int:
        """Place of the source."""
        return self.source.position

    def iter_bytes(self, chunk: int = _PIECE) -> Iterator[memoryview]:
        """Yield the 8-bit numbers, in row order; each piece is overwritten by the next."""
        if self.per_tensor:
            whole = torch.stack([amax.amax() for _, amax in self._rows(chunk)]).amax()
            self._set_scale(self.scale, whole)
        # Written over: the kernel clears fresh memory slower than a core multiplies. And nothing
        # made here outlives its piece: small things left between large ones cost the heap GBs.
        scaled, stored = torch.empty(0), torch.empty(0, dtype=self.scheme.dtype)
        done = 0
        for rows, amax in self._rows(chunk):
            scale = self.scale if self.per_tensor else self.scale[done : done + len(rows)]
            done += len(rows)
            if not self.per_tensor:
                self._set_scale(scale, amax)
            if scaled.shape != rows.shape:  # the first piece, and the last
                scaled, stored = (torch.empty_like(rows, dtype=b.dtype) for b in (scaled, stored))
            # Promotes 16 bits to fp32.
            torch.mul(rows, scale.reciprocal().unsqueeze(-1), out=scaled)
            if not self.scheme.format.exponent_bits:
                scaled.round_()
            if self.scheme.format.zero_point:
                scaled.add_(self.scheme.format.zero_point)
            yield stored.copy_(scaled).view(torch.uint8).numpy().data.cast("B")

    def _set_scale(self, scale: Tensor, amax: Tensor) -> None:
        scale.copy_(torch.where(amax < TINY, 1.0, amax / self.scheme.limit))

    def iter_converted(self, dtype: str, chunk: int = _PIECE) -> Iterator[Chunk]:
        """Yield the 8-bit numbers; ``dtype`` can be no other."""
        assert dtype == self.dtype, f"{self.name} is {self.dtype}, not {dtype}"
        yield from self.iter_bytes(chunk)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of the source."""
        return self.source.files

    def _rows(self, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield whole rows ``[r, K]`` and their largest magnitudes ``[r]`` in fp32."""
        columns = self.shape[1]
        width = BY_SAFETENSORS[self.source.dtype].nbytes(columns)
        for piece in self.source.iter_bytes(max(1, chunk // width) * width):
            rows = torch.frombuffer(piece, dtype=FLOATS[self.source.dtype]).view(-1, columns)
            if self.smooth is not None:
                rows = rows * self.smooth
            amax = magnitudes(rows)
            if not torch.isfinite(amax).all():
                self.source.require_finite(piece)
                raise CorruptInputError(
                    f"{self.file}: tensor {self.name!r} overflows when it is smoothed; use a "
                    "smaller --smooth"
                )
            yield rows, amax


def magnitudes(rows: Tensor) -> Tensor:
    """Largest magnitude of each row of ``[r, K]``, fp32 ``[r]``; not finite where a number is not.

    Without their sign, bit patterns of floats have the order of the numbers, with infinity and NaN
    above all: the maximum of integers is many times as fast as that of floats.
    """
    bits = rows.view(torch.int32 if rows.itemsize == 4 else torch.int16)
    largest = (bits & torch.iinfo(bits.dtype).max).amax(1)
    return largest.view(rows.dtype).float()


def quantize_weights(weights: ComponentWeights, recipe: Recipe) -> dict[str, TensorSource]:
    """Replace the weights that a recipe quantises by sources of their 8-bit numbers."""
    kept = kept_weights(weights, recipe)
    tensors = dict(weights.tensors) | kept
    for name in sorted(recipe.weights - kept.keys()):
        vector = smoothing_of(name.removesuffix(".weight"))
        tensors[name] = QuantizedTensor.of(
            tensors[name],
            recipe.scheme,
            per_tensor=recipe.options.weight_scale == "tensor",
            smooth=None if vector is None else recipe.smooth.get(vector),
        )
    return tensors


def scale_tensors(tensors: Mapping[str, TensorSource], recipe: Recipe) -> dict[str, Tensor]:
    """Everything in fp32 that a quantised graph reads beside its weights, by name.

    Call it once the weights are written.
    """
    scales = {
        f"{name}_scale": source.scale
        for name, source in tensors.items()
        if isinstance(source, QuantizedTensor | KeptWeight)
    }
    shared = set()
    for name in sorted(recipe.layers, key=_place_among_readers):
        scale = recipe.layers[name]
        if scale is not None and shared_input(name) not in shared:
            shared.add(shared_input(name))
            scales[f"{name}.input_scale"] = torch.tensor(scale)
    for name, of_qkv in recipe.attention.items():
        for letter, value in zip("qkv", of_qkv, strict=True):
            scales[f"{name}.{letter}_scale"] = torch.tensor(value)
    return scales | dict(recipe.smooth)


def _place_among_readers(layer: str) -> int:
    """Number of a layer among those that read its input: the first one names their scale."""
    for group in SHARED_INPUTS:
        for position, member in enumerate(group):
            if layer.endswith(f".{member}"):
                return position
    return 0
