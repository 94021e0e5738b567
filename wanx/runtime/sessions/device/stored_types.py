"""Conversion of arrays to the inputs of engines, and back; see :mod:`wanx.files.floats`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from wanx.bundle.engine_schedule import InputType
from wanx.files.floats import NUMPY, convert


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
