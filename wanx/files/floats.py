"""Stored numbers as numpy arrays: converting floats, and finding NaN and infinity, chunk by chunk.

numpy has no bfloat16 and no float8; both are kept as unsigned integers of their width. Types have
safetensors' names, and chunks are little-endian bytes of whole elements.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from wanx.config import number_formats
from wanx.config.number_formats import BY_SAFETENSORS, INT8, UINT8

Chunk = bytes | bytearray | memoryview

NUMPY: dict[str, np.dtype[Any]] = {
    row.safetensors: np.dtype(row.torch if hasattr(np, row.torch) else f"u{row.bits // 8}")
    .newbyteorder("<")
    for row in number_formats.FORMATS
}  # fmt: skip
CENTRED = (UINT8.safetensors, INT8.safetensors)  # conversion of what is stored 128 above zero
FLOATS = frozenset(row.safetensors for row in number_formats.FLOATS)
_BLOCK = 1 << 16  # numbers converted at a time, so that they are still in the cache for each pass


def has_nonfinite(chunk: Chunk, dtype: str) -> bool:
    """True if a chunk holds a NaN or an infinity.

    Works on bit patterns: as unsigned integers the negative non-finite numbers are the largest, as
    signed integers the positive ones are, so two maxima decide.

    Args:
        chunk: bytes of whole elements.
        dtype: ``F32``, ``F16`` or ``BF16``.
    """
    width = NUMPY[dtype].itemsize
    infinity = BY_SAFETENSORS[dtype].infinity
    negative_infinity = infinity | 1 << (8 * width - 1)
    unsigned = np.frombuffer(chunk, f"<u{width}")
    signed = unsigned.view(f"<i{width}")
    if not len(unsigned):
        return False
    return int(unsigned.max()) >= negative_infinity or int(signed.max()) >= infinity


def convert_chunk(chunk: Chunk, from_dtype: str, to_dtype: str) -> Chunk:
    """Convert finite numbers between ``F32``, ``F16`` and ``BF16``, rounding to nearest even.

    Args:
        chunk: bytes of whole, finite elements; returned as it is when the types are equal.
        from_dtype: type of the chunk.
        to_dtype: type of the result.

    Raises:
        OverflowError: a number is too large for ``to_dtype``.
    """
    if from_dtype == to_dtype:
        return chunk
    source = np.frombuffer(chunk, NUMPY[from_dtype])
    target = np.empty(len(source), NUMPY[to_dtype])
    for i in range(0, len(source), _BLOCK):
        _convert(source[i : i + _BLOCK], from_dtype, to_dtype, target[i : i + _BLOCK])
    converted = target.view(np.uint8).data
    if to_dtype != "F32" and has_nonfinite(converted, to_dtype):
        largest = float(np.abs(convert(source, from_dtype, "F32")).max())
        raise OverflowError(f"{largest:.4g} is above the largest number of {to_dtype}")
    return converted


def from_float64(values: NDArray[Any], dtype: str) -> Chunk:
    """Round float64 once to ``F32``, ``F16`` or ``BF16``, to nearest even.

    Args:
        values: finite numbers, or float32 ones.
        dtype: type of the result.

    Raises:
        OverflowError: a number is too large for ``dtype``.
    """
    with np.errstate(over="ignore"):
        if dtype == "BF16":
            target = np.empty(values.shape, NUMPY[dtype])
            _narrow(_off_ties(values), target)
        else:
            target = np.ascontiguousarray(values, NUMPY[dtype])
    converted = target.reshape(-1).view(np.uint8).data
    if has_nonfinite(converted, dtype):
        largest = float(np.abs(values).max())
        raise OverflowError(f"{largest:.4g} is above the largest number of {dtype}")
    return converted


def _off_ties(values: NDArray[Any]) -> NDArray[Any]:
    """Float64 as float32, so that rounding that to bfloat16 is rounding once.

    The middle of two numbers of bfloat16 is one of float32, so both roundings agree but where the
    first one ends there: then the value itself says on which side it lies.
    """
    narrow = values.astype(np.float32)
    if values.dtype != np.float32:
        bits = narrow.view(np.int32)
        ties = np.flatnonzero((bits & 0xFFFF) == 0x8000)
        if len(ties):
            exact, rounded = np.abs(values.flat[ties]), np.abs(narrow.flat[ties].astype(np.float64))
            bits.flat[ties] += np.sign(exact - rounded).astype(np.int32)
    return narrow


def convert(values: NDArray[Any], from_dtype: str, to_dtype: str) -> NDArray[Any]:
    """Convert between ``F32``, ``F16`` and ``BF16``, rounding to nearest even, or ``U8`` to ``I8``.

    What is too large becomes infinity, and NaN stays NaN. Numbers of ``U8`` are 128 above those of
    ``I8``.

    Args:
        values: of the numpy type of ``from_dtype``, any shape.
        from_dtype: type of the values.
        to_dtype: type of the result; equal types give ``values`` themselves.

    Raises:
        ValueError: there is no such conversion.
    """
    if from_dtype == to_dtype:
        return values
    if (from_dtype, to_dtype) == CENTRED:
        return (values ^ np.uint8(UINT8.zero_point)).view(np.int8)
    if not {from_dtype, to_dtype} <= FLOATS:
        raise ValueError(f"{from_dtype} does not become {to_dtype}")
    out = np.empty(values.shape, NUMPY[to_dtype])
    _convert(values, from_dtype, to_dtype, out)
    return out


def _convert(values: NDArray[Any], from_dtype: str, to_dtype: str, out: NDArray[Any]) -> None:
    # float32 holds both 16-bit formats exactly, so going through it rounds only once.
    wide = values
    if from_dtype == "BF16":
        wide = out if to_dtype == "F32" else np.empty(values.shape, np.float32)
        _widen(values, wide)
    if to_dtype == "BF16":
        _narrow(wide.astype(np.float32, copy=False), out)
    elif wide is not out:
        with np.errstate(over="ignore"):
            out[...] = wide


def _widen(bits: NDArray[Any], out: NDArray[Any]) -> None:
    """Write the bits of bfloat16 as float32."""
    wide = out.view(np.uint32)
    wide[...] = bits
    wide <<= 16


def _narrow(values: NDArray[Any], out: NDArray[Any]) -> None:
    """Write float32 as the bits of bfloat16, rounded to nearest even; NaN stays NaN."""
    bits = values.view(np.uint32)
    # Half of the last place that is kept, less one where that place is even: ties go to even.
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    out[...] = rounded
    if np.isnan(values.max(initial=0)):
        nan = np.isnan(values)
        out[nan] = bits[nan] >> 16 | 0x40
