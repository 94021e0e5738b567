"""What engines take and give, as numpy arrays."""

from __future__ import annotations

import numpy as np

from wanx.runtime.sessions.device.stored_types import as_float32, as_input


def test_inputs_are_dense_and_keep_their_shape() -> None:
    array = np.arange(12, dtype=np.float64).reshape(3, 4).T
    for name in ("F32", "F16", "BF16"):
        made = as_input(array, name)
        assert made.shape == (4, 3)
        assert made.flags.c_contiguous
        np.testing.assert_array_equal(as_float32(made, name), array)
        assert as_input(np.array(2.0), name).shape == ()
    numbers = as_input(np.array([[1, 2]], np.int32), "I64")
    assert numbers.dtype == np.int64


def test_what_is_read_is_a_copy() -> None:
    array = np.ones(3, np.float32)
    made = as_float32(array, "F32")
    array[:] = 2
    assert made.tolist() == [1, 1, 1]
