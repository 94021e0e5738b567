"""Triton's interpreter, which runs kernels on the processor, with rounding as GPUs do it.

On a machine with a GPU the same tests run the compiled kernels there instead.

Its own conversion to narrower floats loses the carry from the mantissa into the exponent (7.93
becomes 4.0 in e4m3), truncates to bfloat16, and rounds ties up; PyTorch's rounds to nearest even.
Its products take the bits of bfloat16 for integers.
"""

from __future__ import annotations

import os
from typing import Any

import torch

# Kernels are compiled or interpreted as was decided when they were imported.
GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"
DEVICE = "cuda" if GPU else "cpu"


def patch_interpreter() -> None:
    """Let the interpreter convert and multiply numbers by PyTorch's rules."""
    if GPU:
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    types = {
        tl.float32: torch.float32,
        tl.float16: torch.float16,
        tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn,
    }
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}
    original = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        nearest = rounding in (None, interpreter._ir.ROUNDING_MODE.RTNE)
        if not (nearest and source in types and target in types):
            return original(data, source, target, rounding)
        numbers = torch.frombuffer(bytearray(data.tobytes()), dtype=types[source])
        rounded = numbers.to(types[target])
        return np.frombuffer(
            rounded.view(torch.uint8).numpy().tobytes(), dtype=unsigned[rounded.itemsize]
        ).reshape(data.shape)

    interpreter._convert_float = convert

    builder = interpreter.InterpreterBuilder
    product = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        a, b = (self.cast_impl(x, tl.float32) if x.dtype == tl.bfloat16 else x for x in (a, b))
        return product(self, a, b, d, *rest)

    builder.create_dot = create_dot
