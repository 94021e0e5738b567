"""Arrays of numbers to what engines take, and back, without PyTorch; see wanx.files.floats."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from wanx.bundle.engine_schedule import InputType
from wanx.files.floats import NUMPY, convert


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
