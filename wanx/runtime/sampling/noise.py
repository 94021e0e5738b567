"""Gaussian noise with the values that ``torch.randn`` draws from a CPU generator.

A seed then means the same video here and in a PyTorch pipeline that uses a CPU generator. Torch
draws from MT19937. Fewer than 16 values come one by one from the Box-Muller transform in double
precision, whose second value is kept for the next such draw. From 16 values on, they come in blocks
of 16 from 24-bit uniforms, by Box-Muller in single precision with the polynomials of the Cephes
library (S. L. Moshier, ``logf``, ``sinf``, ``cosf``).

Accuracy: bit for bit what torch 2.13 gives on Linux x86-64 with AVX2 or AVX-512, where the compiler
fused the multiply-adds that ``_fma`` marks. Builds without these instructions use the C library's
functions instead, and torch differs from torch there by up to about 2e-6, and so does this module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from wanx.errors import UsageError

_BLOCK = 16
_LOG = np.array(
    [7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
     -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1], np.float32,
)  # fmt: skip
_LN2_LOW, _LN2_HIGH = np.array([-2.12194440e-4, 0.693359375], np.float32)
_SQRT_HALF = np.float32(math.sqrt(0.5))
_SIN = np.array([-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1], np.float32)
_COS = np.array([2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2], np.float32)
_QUARTER_PI = np.array([0.78515625, 2.4187564849853515625e-4, 3.77489497744594108e-8], np.float32)
_HALF, _ONE, _TWO = np.array([0.5, 1, 2], np.float32)

Float32 = NDArray[np.float32]


class TorchGenerator:
    """The stream of ``torch.Generator("cpu").manual_seed(seed)``; successive draws continue it.

    Args:
        seed: Any integer that torch accepts, -2**63 to 2**64 - 1. Like torch, only its low 32 bits
            count.

    Raises:
        UsageError: The seed is outside that range.
    """

    def __init__(self, seed: int) -> None:
        if not -(2**63) <= seed < 2**64:
            raise UsageError(f"seed {seed} does not fit in 64 bits; choose one from 0 to 2**63 - 1")
        self._bits = np.random.MT19937()
        np.random.RandomState(self._bits).seed(seed & 0xFFFFFFFF)
        self._spare: float | None = None

    def randn(self, shape: Sequence[int]) -> Float32:
        """Draw standard normal values, float32, as ``torch.randn(shape, generator=...)`` does."""
        size = math.prod(shape)
        if size < _BLOCK:
            values = np.array([self._scalar() for _ in range(size)], np.float32)
        else:
            values = self._blocks(size)
        return values.reshape(tuple(shape))

    def _blocks(self, size: int) -> Float32:
        whole = size - size % _BLOCK
        uniforms = self._uniforms(size)
        values = np.empty(size, np.float32)
        values[:whole] = _box_muller(uniforms[:whole])
        if whole != size:
            # Torch redraws the last 16 values, overlapping the block before them.
            values[-_BLOCK:] = _box_muller(self._uniforms(_BLOCK))
        return values

    def _uniforms(self, size: int) -> Float32:
        raw = self._bits.random_raw(size).astype(np.uint32)
        return (raw & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)

    def _scalar(self) -> float:
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        angle, radius = self._double(), self._double()
        angle *= 2 * math.pi
        radius = math.sqrt(-2 * math.log1p(-radius))
        self._spare = radius * math.sin(angle)
        return radius * math.cos(angle)

    def _double(self) -> float:
        high, low = (int(word) for word in self._bits.random_raw(2))
        return ((high << 32 | low) & (2**53 - 1)) * 2.0**-53


def randn(shape: Sequence[int], seed: int) -> Float32:
    """Draw the values of ``torch.randn(shape, generator=torch.Generator().manual_seed(seed))``.

    Args:
        shape: Shape of the result; the values do not depend on it, only on their number.
        seed: As for `TorchGenerator`.

    Returns:
        float32 array; how close it is to torch is stated at the top of this module.

    Raises:
        UsageError: The seed does not fit in 64 bits.
    """
    return TorchGenerator(seed).randn(shape)


def _box_muller(uniforms: Float32) -> Float32:
    """Turn blocks of 16 uniforms in [0, 1) into normals; items i and i + 8 are a pair."""
    pairs = uniforms.reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(-_TWO * _log(_ONE - pairs[:, 0]))
    sin, cos = _sin_cos(np.float32(2 * math.pi) * pairs[:, 1])
    normals: Float32 = np.stack([radius * cos, radius * sin], axis=1)
    return normals.reshape(-1)


def _fma(a: Float32, b: Float32 | np.float32, c: Float32 | np.float32) -> Float32:
    # The product of two floats is exact in double; rounding the sum twice differs from a true
    # fused multiply-add about once in 2**29 operations.
    return (np.multiply(a, b, dtype=np.float64) + c).astype(np.float32)


def _polynomial(x: Float32, coefficients: Float32) -> Float32:
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = _fma(value, x, coefficient)
    return value


def _log(x: Float32) -> Float32:
    """Cephes ``logf`` for 0 < x <= 1."""
    mantissa, exponent = np.frexp(x)
    low = mantissa < _SQRT_HALF
    power = exponent.astype(np.float32) - low
    rest = np.where(low, (mantissa - _ONE) + mantissa, mantissa - _ONE)
    square = rest * rest
    tail = _fma(_polynomial(rest, _LOG) * rest, square, power * _LN2_LOW)
    tail = _fma(square, -_HALF, tail)
    return _fma(power, _LN2_HIGH, rest + tail)


def _sin_cos(angle: Float32) -> tuple[Float32, Float32]:
    """Cephes ``sinf`` and ``cosf`` for 0 <= angle <= 2π."""
    octant = ((angle * np.float32(4 / math.pi)).astype(np.int32) + 1) & ~1
    rest = angle
    for part in _QUARTER_PI:
        rest = _fma(octant.astype(np.float32), -part, rest)
    square = rest * rest
    cos = _fma(_polynomial(square, _COS) * square, square, -_HALF * square) + _ONE
    sin = _fma(_polynomial(square, _SIN) * square, rest, rest)
    swapped = (octant & 2) != 0
    sin, cos = np.where(swapped, cos, sin), np.where(swapped, sin, cos)
    return np.where(octant & 4, -sin, sin), np.where((octant + 2) & 4, -cos, cos)
