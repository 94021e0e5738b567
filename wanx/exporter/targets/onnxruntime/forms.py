"""Bodies of ``wanx::`` functions that ONNX Runtime's kernels for processors run fast.

``WeightOnlyLinear`` multiplies integers, with the weight as it is stored for the first operand. So
the weight stays a mapped file: it is neither widened nor turned nor packed, and streams from memory
once. The activations x ``[1, n, K]`` get 14 bits, two digits of 7, which are columns of the
second operand:

    x = (128 high + low) step,    step = max |x| / 8191 of each row

Digits of 7 bits, because processors without VNNI add pairs of products of 8 bits in 16:
2 · 255 · 64 still fits.
"""

# mypy: ignore-errors
from __future__ import annotations

from onnxscript import opset23 as op
from onnxscript import script

from wanx.config.number_formats import UINT8
from wanx.kernels.registry import DOMAIN

ZERO = UINT8.zero_point
DIGIT = 64  # largest magnitude of a digit
LARGEST = 2 * DIGIT * DIGIT - 1  # whose digits are in range
TINY = 2.0**-126  # the smallest step, so that rows of zeros have one


@script(DOMAIN, default_opset=op)
def WeightOnlyLinear(x, weight8, weight_scale):  # type: ignore[no-untyped-def]
    base = op.Constant(value_float=2.0 * DIGIT)
    last = op.Constant(value_ints=[-1])
    amax = op.ReduceMax(op.Abs(x), last)
    step = op.Max(amax / op.Constant(value_float=LARGEST), op.Constant(value_float=TINY))
    # Integers have no NaN, and a maximum may pass one over: so it goes into the step.
    step = step + op.ReduceSum(x, last) * op.Constant(value_float=0.0)
    q = op.Round(x / step)
    high = op.Round(q / base)
    digits = op.Cast(op.Concat(high, q - high * base, axis=1), to=3)
    columns = op.Transpose(op.Squeeze(digits, op.Constant(value_ints=[0])), perm=[1, 0])
    zero = op.CastLike(op.Constant(value_int=ZERO), weight8)
    sums = op.Cast(op.MatMulInteger(weight8, columns, zero), to=1)
    of_high, of_low = op.Split(sums, axis=1, num_outputs=2)
    y = op.Transpose(of_high * base + of_low, perm=[1, 0]) * weight_scale
    return op.Unsqueeze(y, op.Constant(value_ints=[0])) * step
