"""Readback of stored 8-bit weights, compared with their originals.

Nothing here trusts the code that quantised. A stored weight is right when every number is the 8-bit
one nearest to its original, in units of the stored scale.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from wanx.checkpoints.tensors.source import SafetensorsTensor, TensorSource
from wanx.errors import WanxError, abbreviate
from wanx.exporter.quantization.quantize import FLOATS, TINY
from wanx.exporter.quantization.recipe import Recipe, smoothing_of
from wanx.files.safetensors import TensorRef
from wanx.kernels.number_formats import FORMATS

_SPOT_BYTES = 1 << 20
_SLACK = 1e-3  # of a step, for the rounding of scales and products in fp32


def require_nearest(
    sources: Mapping[str, TensorSource],
    written: Mapping[str, TensorRef],
    recipe: Recipe,
    kept: Collection[str] = (),
) -> None:
    """Check the first megabyte of every quantised weight, and all vectors of smoothing.

    Every stored number times its scale must be within half a step of its original, and the largest
    number of a row, or of the whole tensor where that has one scale, must use the format's whole
    range, unless numbers and scale are the checkpoint's.

    Args:
        sources: the weights before they were quantised.
        written: where the tensors of the bundle lie, scales among them.
        recipe: what they were quantised by.
        kept: weights that were 8-bit in the checkpoint, and stayed.

    Raises:
        WanxError: names what is wrong.
    """
    wrong = [
        name
        for name in sorted(recipe.weights)
        if not _is_right(name, sources, written, recipe, whole_range=name not in kept)
    ]
    if wrong:
        raise WanxError(
            f"these weights do not match their scales: {abbreviate(wrong)}; this is a fault "
            "of wanx or of the disk, export again and report it if it stays"
        )
    wrong = [name for name, v in recipe.smooth.items() if not torch.equal(_read(written[name]), v)]
    if wrong:
        raise WanxError(
            f"these smoothing vectors are not those of the recipe: {abbreviate(wrong)}; this is a "
            "fault of wanx or of the disk, export again and report it if it stays"
        )


def _is_right(
    name: str,
    sources: Mapping[str, TensorSource],
    written: Mapping[str, TensorRef],
    recipe: Recipe,
    *,
    whole_range: bool,
) -> bool:
    dtype, per_tensor = recipe.scheme.dtype, recipe.options.weight_scale == "tensor"
    stored_ref, scale_ref = written.get(name), written.get(f"{name}_scale")
    if stored_ref is None or scale_ref is None:
        return False
    original = _first_rows(sources[name])
    vector = smoothing_of(name.removesuffix(".weight"))
    if vector is not None and vector in recipe.smooth:
        original = original * recipe.smooth[vector]
    stored = _stored_rows(stored_ref, len(original), dtype)
    scale = _read(scale_ref)
    if scale.shape != (() if per_tensor else stored_ref.shape[:1]):
        return False
    units = original / (scale if per_tensor else scale[: len(original), None])
    if not ((stored - units).abs() <= _half_steps(units, dtype)).all():  # nor where one is NaN
        return False
    if not whole_range:
        return True
    if per_tensor:
        largest, amax = _largest(stored_ref, dtype), original.abs().amax()
    else:
        largest, amax = stored.abs().amax(dim=1), original.abs().amax(dim=1)
    return bool(((largest >= 0.99 * recipe.scheme.limit) | (amax < TINY)).all())


def _half_steps(units: Tensor, dtype: torch.dtype) -> Tensor:
    """Largest distance to the nearest 8-bit number, with the slack that fp32 needs."""
    if not FORMATS[dtype].exponent_bits:
        return torch.full_like(units, 0.5 * (1 + 2 * _SLACK))
    # A mantissa of m bits has 2^m steps to each power of two; subnormal numbers are equally far.
    row = FORMATS[dtype]
    _, exponent = torch.frexp(units.abs().clamp_min(2.0**row.min_exponent))
    half_step = torch.ldexp(torch.ones_like(units), exponent - 2 - row.mantissa_bits)
    return half_step * (1 + _SLACK) + _SLACK * 2.0 ** (row.min_exponent - row.mantissa_bits - 1)


def _first_rows(source: TensorSource) -> Tensor:
    row = source.nbytes // source.shape[0]
    piece = next(source.iter_bytes(max(1, _SPOT_BYTES // row) * row))
    return torch.frombuffer(piece, dtype=FLOATS[source.dtype]).view(-1, source.shape[1]).float()


def _stored_rows(ref: TensorRef, rows: int, dtype: torch.dtype) -> Tensor:
    piece = next(SafetensorsTensor.from_ref(ref).iter_bytes(rows * ref.shape[1]))
    return _numbers(piece, dtype).view(rows, -1)


def _numbers(piece: memoryview, dtype: torch.dtype) -> Tensor:
    """Stored numbers, before their scale, in fp32."""
    return torch.frombuffer(piece, dtype=dtype).float() - FORMATS[dtype].zero_point


def _largest(ref: TensorRef, dtype: torch.dtype) -> Tensor:
    """The largest magnitude of a whole tensor."""
    pieces = SafetensorsTensor.from_ref(ref).iter_bytes()
    return torch.stack([_numbers(piece, dtype).abs().amax() for piece in pieces]).amax()


def _read(ref: TensorRef) -> Tensor:
    data = b"".join(SafetensorsTensor.from_ref(ref).iter_bytes())
    return torch.frombuffer(bytearray(data), dtype=torch.float32).view(ref.shape)
