from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.onnx_runs import run_function
from tests.support.peers import relative_error
from wanx.kernels.registry import NODES
from wanx.kernels.weight_only_linear import (
    WeightOnlyLinear,
    weight_only_linear,
    weight_only_linear_reference,
)

# (leading sizes, K, N)
SIZES = [((1, 1), 7, 1), ((1, 5), 130, 7), ((2, 33), 257, 130), ((4,), 64, 257)]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
Size = tuple[tuple[int, ...], int, int]


def arguments(
    size: Size, x_type: torch.dtype = torch.float32, *, per_tensor: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    leading, k, n = size
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*leading, k, generator=generator).to(x_type)
    weight8 = torch.randint(256, (n, k), generator=generator, dtype=torch.uint8)
    scale = torch.rand(() if per_tensor else (n,), generator=generator) * 0.01 + 1e-4
    return x, weight8, scale


def formula(x: Tensor, weight8: Tensor, weight_scale: Tensor) -> Tensor:
    return torch.einsum("...k,nk,n->...n", x, weight8 - 128, weight_scale.expand(len(weight8)))


@pytest.mark.parametrize("x_type", TYPES)
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_reference_and_onnx_function(
    size: Size,
    per_tensor: bool,
    x_type: torch.dtype,
    assert_rounded_once: Callable[[Tensor, Tensor], None],
) -> None:
    values = arguments(size, x_type, per_tensor=per_tensor)
    reference = weight_only_linear_reference(*values)
    assert (reference.dtype, reference.shape) == (x_type, (*size[0], size[2]))
    assert_rounded_once(reference, formula(*(value.double() for value in values)))
    if x_type == torch.float32:
        (out,) = run_function(WeightOnlyLinear, values)
        assert relative_error(out, reference) <= 1e-5


@pytest.mark.parametrize("size", SIZES[1:])
def test_onnx_function_in_half_precision(size: Size) -> None:
    values = arguments(size, torch.float16)
    (out,) = run_function(WeightOnlyLinear, values)
    assert relative_error(out, weight_only_linear_reference(*values).float()) <= 0.005


def test_bias() -> None:
    values = arguments(SIZES[1])
    bias = torch.arange(7.0)
    out = weight_only_linear(*values, bias)
    assert relative_error(out, formula(*(v.double() for v in values)) + bias) <= 1e-5


def test_a_faint_row_is_not_lost() -> None:
    """A row of the smallest scale keeps its digits beside one of a large scale."""
    x, weight8, _ = arguments(((3,), 130, 2))
    scale = torch.tensor([2.0**-126, 1e30])
    exact = formula(x.double(), weight8.double(), scale.double())
    for out in (
        weight_only_linear(x, weight8, scale),
        *run_function(WeightOnlyLinear, (x, weight8, scale)),
    ):
        for column in range(2):
            assert relative_error(out[:, column], exact[:, column]) <= 1e-5


def test_op() -> None:
    overload = torch.ops.wanx.weight_only_linear.default
    values = arguments(SIZES[1])
    assert overload in NODES
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(overload, values, test_utils=checks)
    out = overload(*values)
    for index in (0, 2):
        leaf = values[index].clone().requires_grad_()
        exact = values[index].double().requires_grad_()
        ours = weight_only_linear(*values[:index], leaf, *values[index + 1 :])
        torch.testing.assert_close(ours, out)
        ours.square().sum().backward()
        doubles = [value.double() for value in values]
        formula(*doubles[:index], exact, *doubles[index + 1 :]).square().sum().backward()
        assert leaf.grad is not None
        assert relative_error(leaf.grad, exact.grad) <= 1e-5
