from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support.peers import relative_error
from wanx.kernels.channel_norm import ChannelNorm, channel_norm, channel_norm_reference

SHAPES = [(1, 1, 3), (2, 8, 1, 5), (1, 33, 7, 3), (1, 96, 2, 3, 5)]
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def formula(x: Tensor, weight: Tensor) -> Tensor:
    return F.normalize(x, dim=1, eps=1e-12) * x.shape[1] ** 0.5 * weight


def arguments(
    shape: tuple[int, ...],
    x_type: torch.dtype = torch.float32,
    weight_type: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 3 + 1
    weight = torch.randn(shape[1], *(1,) * (len(shape) - 2), generator=generator)
    return x.to(x_type), weight.to(weight_type)


@pytest.mark.parametrize("weight_type", TYPES)
@pytest.mark.parametrize("x_type", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_and_onnx_function(
    shape: tuple[int, ...],
    x_type: torch.dtype,
    weight_type: torch.dtype,
    run_onnx: Callable[..., list[Tensor]],
    assert_rounded_once: Callable[[Tensor, Tensor], None],
) -> None:
    values = arguments(shape, x_type, weight_type)
    exact = formula(*(value.double() for value in values))
    eps = 1e-24 / shape[1]
    reference = channel_norm_reference(*values, eps)
    (out,) = run_onnx(ChannelNorm, values, eps=eps)
    assert reference.dtype == x_type
    assert_rounded_once(reference, exact)
    assert_rounded_once(out.to(x_type), exact)
    assert relative_error(out, reference.float()) <= (1e-5 if x_type == torch.float32 else 0.03)


@pytest.mark.parametrize("size", [0.0, 1e-13, 1e-10])
def test_faint_channels(size: float, run_onnx: Callable[..., list[Tensor]]) -> None:
    """Below the norm of 1e-12 nothing is blown up, above it everything has the same size."""
    x, weight = torch.full((1, 4, 2), size), torch.ones(4, 1)
    expected = formula(x.double(), weight.double()).float()
    (onnx,) = run_onnx(ChannelNorm, (x, weight), eps=1e-24 / 4)
    for out in (channel_norm(x, weight), onnx):
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_op(shape: tuple[int, ...], check_op: Callable[..., None]) -> None:
    check_op(
        torch.ops.wanx.channel_norm.default,
        (*arguments(shape), 1e-24 / shape[1]),
        channel_norm,
        formula,
    )
