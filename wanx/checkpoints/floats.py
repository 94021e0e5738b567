"""Floating-point formats of weights: finding NaN and infinity, and converting, chunk by chunk.

Chunks are little-endian bytes of whole elements; types have safetensors' names.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

Chunk = bytes | bytearray | memoryview

FLOAT_TYPES: dict[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Bit patterns of +infinity: everything above it up to the sign bit is NaN.
_INFINITY = {"F32": 0x7F80_0000, "F16": 0x7C00, "BF16": 0x7F80}
_BLOCK = 1 << 20  # bytes worked on at a time, so that they are still in the cache for each pass


def has_nonfinite(chunk: Chunk, dtype: str) -> bool:
    """True if a chunk holds a NaN or an infinity.

    Works on bit patterns: as unsigned integers the negative non-finite numbers are the largest, as
    signed integers the positive ones are, so two maxima decide.

    Args:
        chunk: bytes of whole elements.
        dtype: ``F32``, ``F16`` or ``BF16``.
    """
    width = FLOAT_TYPES[dtype].itemsize
    infinity = _INFINITY[dtype]
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
    source = np.frombuffer(chunk, FLOAT_TYPES[from_dtype])
    target = np.empty(len(source), FLOAT_TYPES[to_dtype])
    step = _BLOCK // 4
    with np.errstate(over="ignore"):  # looked for below: ml_dtypes raises no flag
        for i in range(0, len(source), step):
            block = source[i : i + step]
            # float32 holds both 16-bit formats exactly, so going through it rounds only once
            target[i : i + step] = block.astype(np.float32, copy=False)
    converted = target.view(np.uint8).data
    if to_dtype != "F32" and has_nonfinite(converted, to_dtype):
        largest = float(np.abs(source.astype(np.float32)).max())
        raise OverflowError(f"{largest:.4g} is above the largest number of {to_dtype}")
    return converted
