from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peers import relative_error
from torch import Tensor

from wanx.kernels.adaln import AdaLN, adaln, adaln_reference

EPS = 0.05  # large enough to be seen
SHAPES = [(1, 1, 8), (1, 7, 72), (2, 5, 96), (1, 33, 128)]
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def formula(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + EPS).sqrt() * (1 + scale) + shift


def arguments(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    batch, _, dim = shape
    generator = torch.Generator().manual_seed(0)
    # Far from zero mean, so that the statistics matter.
    x = (torch.randn(shape, generator=generator) * 2 + 3).to(dtype)
    scale, shift = (torch.randn(batch, 1, dim, generator=generator) for _ in range(2))
    return x, scale, shift


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    assert_rounded_once: Callable[[Tensor, Tensor], None],
) -> None:
    x, scale, shift = arguments(shape, dtype)
    out = adaln_reference(x, scale, shift, EPS)
    assert out.dtype == dtype
    assert_rounded_once(out, formula(x.double(), scale.double(), shift.double()))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_onnx_function(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    run_onnx: Callable[..., list[Tensor]],
    assert_rounded_once: Callable[[Tensor, Tensor], None],
) -> None:
    values = arguments(shape, dtype)
    (out,) = run_onnx(AdaLN, values, eps=EPS)
    exact = formula(*(value.double() for value in values))
    assert_rounded_once(out.to(dtype), exact)
    if dtype == torch.float32:
        assert relative_error(out, adaln_reference(*values, EPS)) <= 1e-5


def test_constant_row_is_the_shift(run_onnx: Callable[..., list[Tensor]]) -> None:
    """Without eps, a row of no variance would be 0/0."""
    x, scale, shift = arguments((1, 3, 16))
    x = torch.full_like(x, 5.0)
    for out in (
        adaln_reference(x, scale, shift, EPS),
        *run_onnx(AdaLN, (x, scale, shift), eps=EPS),
    ):
        torch.testing.assert_close(out, shift.expand_as(x))


@pytest.mark.parametrize("shape", SHAPES)
def test_op(shape: tuple[int, ...], check_op: Callable[..., None]) -> None:
    check_op(
        torch.ops.wanx.adaln.default,
        (*arguments(shape), EPS),
        lambda *tensors: adaln(*tensors, eps=EPS),
        formula,
    )
