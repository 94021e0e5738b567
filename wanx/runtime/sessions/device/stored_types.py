"""Stored number formats and conversions between them, as bits in numpy arrays.

numpy has no bfloat16 and no float8; both are kept as unsigned integers of their width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from wanx.bundle.engine_schedule import InputType

NUMPY: dict[InputType, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I8": np.dtype("<i1"),
    "F8_E4M3": np.dtype("<u1"),
    "I64": np.dtype("<i8"),
}
FLOATS = frozenset({"F32", "F16", "BF16"})


def convert(values: NDArray[Any], source: str, target: str) -> NDArray[Any]:
    """Convert between ``F32``, ``F16`` and ``BF16``, rounding to nearest even.

    Args:
        values: of the numpy type of ``source``, any shape.
        source: format of the values.
        target: format of the result; equal formats give ``values`` themselves.

    Raises:
        ValueError: there is no such conversion.
    """
    if source == target:
        return values
    if not {source, target} <= FLOATS:
        raise ValueError(f"{source} does not become {target}")
    # float32 holds both 16-bit formats exactly, so going through it rounds only once.
    wide = widen(values) if source == "BF16" else values.astype(np.float32, copy=False)
    if target == "BF16":
        return narrow(wide)
    with np.errstate(over="ignore"):  # to infinity, as PyTorch does
        return wide.astype(NUMPY["F32" if target == "F32" else "F16"], copy=False)


def widen(bits: NDArray[Any]) -> NDArray[np.float32]:
    """Convert the bits of bfloat16 to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Convert float32 to the bits of bfloat16, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32).reshape(values.shape)
    # Half of the last place that is kept, less one where that place is even: ties go to even.
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1)))) >> 16).astype(np.uint16)
    quiet = ((bits >> 16) | np.uint32(0x40)).astype(np.uint16)
    return np.where(np.isnan(values), quiet, rounded)


def as_input(array: NDArray[Any], dtype: InputType) -> NDArray[Any]:
    """Convert an array to an engine's input: dense, of the numpy type of ``dtype``.

    Raises:
        ValueError: engines take no numbers of that type from outside.
    """
    if dtype == "I64":
        values: NDArray[Any] = array.astype(NUMPY["I64"])
    else:
        values = convert(np.asarray(array, np.float32), "F32", dtype)
    return np.ascontiguousarray(values).reshape(array.shape)  # the former makes scalars vectors


def as_float32(values: NDArray[Any], source: str) -> NDArray[np.float32]:
    """Convert an engine's output to float32, in memory of its own.

    Raises:
        ValueError: it is no float of 16 or 32 bits.
    """
    return np.array(convert(values, source, "F32"), np.float32)
