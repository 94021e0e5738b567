"""Numbers as they are stored and as engines take them, without PyTorch: bits in numpy arrays.

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


def convert(values: NDArray[Any], found: str, wanted: str) -> NDArray[Any]:
    """Convert between ``F32``, ``F16`` and ``BF16``, rounding to nearest even.

    Args:
        values: of the numpy type of ``found``, any shape.
        found: type of the values.
        wanted: type of the result; equal types give ``values`` themselves.

    Raises:
        ValueError: there is no such conversion.
    """
    if found == wanted:
        return values
    if not {found, wanted} <= FLOATS:
        raise ValueError(f"{found} does not become {wanted}")
    # float32 holds both 16-bit formats exactly, so going through it rounds only once.
    wide = widen(values) if found == "BF16" else values.astype(np.float32, copy=False)
    if wanted == "BF16":
        return narrow(wide)
    with np.errstate(over="ignore"):  # to infinity, as PyTorch does
        return wide.astype(NUMPY["F32" if wanted == "F32" else "F16"], copy=False)


def widen(bits: NDArray[Any]) -> NDArray[np.float32]:
    """The bits of bfloat16 as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Float32 as the bits of bfloat16, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32).reshape(values.shape)
    # Half of the last place that is kept, less one where that place is even: ties go to even.
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1)))) >> 16).astype(np.uint16)
    quiet = ((bits >> 16) | np.uint32(0x40)).astype(np.uint16)
    return np.where(np.isnan(values), quiet, rounded)


def as_input(array: NDArray[Any], wanted: InputType) -> NDArray[Any]:
    """A numpy array of numbers as what an engine takes: dense, of the numpy type of ``wanted``.

    Raises:
        ValueError: engines take no numbers of that type from outside.
    """
    if wanted == "I64":
        values: NDArray[Any] = array.astype(NUMPY["I64"])
    else:
        values = convert(np.asarray(array, np.float32), "F32", wanted)
    return np.ascontiguousarray(values).reshape(array.shape)  # the former makes scalars vectors


def as_float32(values: NDArray[Any], found: str) -> NDArray[np.float32]:
    """What an engine gave as float32, in memory of its own.

    Raises:
        ValueError: it is no float of 16 or 32 bits.
    """
    return np.array(convert(values, found, "F32"), np.float32)
