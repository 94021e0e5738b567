from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.interpreter import DEVICE
from tests.support.onnx_runs import run_function
from tests.support.peers import relative_error
from wanx.kernels.quant_linear_residual import (
    QuantLinearResidual,
    quant_linear_residual,
    quant_linear_residual_reference,
)
from wanx.kernels.quantize import quantize_reference
from wanx.kernels.registry import NODES

E4M3 = torch.float8_e4m3fn
EIGHT_BIT = [torch.int8, E4M3]
TYPES = [torch.float32, torch.bfloat16]
# B, L, K, N
SIZES = [(1, 1, 7, 5), (2, 17, 57, 70), (3, 5, 64, 33)]
Size = tuple[int, int, int, int]


def arguments(
    size: Size,
    dtype: torch.dtype,
    *,
    per_tensor: bool = False,
    shared: bool = False,
    bias_type: torch.dtype = torch.bfloat16,
    stream_type: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:
    batch, length, k, n = size
    generator = torch.Generator().manual_seed(0)
    x_scale = torch.tensor(0.031)
    x8 = quantize_reference(torch.randn(batch, length, k, generator=generator), x_scale, dtype)
    weight_scale = torch.rand(() if per_tensor else (n,), generator=generator) * 0.01 + 0.01
    weight = torch.randn(n, k, generator=generator) / k**0.5
    weight8 = quantize_reference(weight, weight_scale.reshape(-1, 1), dtype)
    bias = torch.randn(n, generator=generator).to(bias_type)
    residual = torch.randn(batch, length, n, generator=generator).to(stream_type)
    gate = torch.randn(1 if shared else batch, 1, n, generator=generator)
    return x8, x_scale, weight8, weight_scale, bias, residual, gate


def formula(*values: Tensor) -> Tensor:
    x8, x_scale, weight8, weight_scale, bias, residual, gate = values
    scale = weight_scale.expand(len(weight8))
    return residual + gate * (torch.einsum("...k,nk,n->...n", x8 * x_scale, weight8, scale) + bias)


def exactly(values: tuple[Tensor, ...]) -> Tensor:
    return formula(*(value.double() for value in values))


@pytest.mark.parametrize("stream_type", TYPES)
@pytest.mark.parametrize("bias_type", TYPES)
@pytest.mark.parametrize(("per_tensor", "shared"), [(False, False), (True, True)])
@pytest.mark.parametrize("dtype", EIGHT_BIT)
@pytest.mark.parametrize("size", SIZES)
def test_reference_and_onnx_function(
    size: Size,
    dtype: torch.dtype,
    per_tensor: bool,
    shared: bool,
    bias_type: torch.dtype,
    stream_type: torch.dtype,
    assert_rounded_once: Callable[[Tensor, Tensor], None],
) -> None:
    """A bias in bf16 beside a stream in fp32: what lies between is not rounded."""
    values = arguments(
        size, dtype, per_tensor=per_tensor, shared=shared, bias_type=bias_type,
        stream_type=stream_type,
    )  # fmt: skip
    reference = quant_linear_residual_reference(*values)
    assert reference.dtype == stream_type
    assert_rounded_once(reference, exactly(values))
    (out,) = run_function(QuantLinearResidual, values)
    assert_rounded_once(out.to(stream_type), exactly(values))


@pytest.mark.parametrize("dtype", EIGHT_BIT)
def test_op(dtype: torch.dtype) -> None:
    overload = torch.ops.wanx.quant_linear_residual.default
    assert overload in NODES
    values = arguments(SIZES[1], dtype, bias_type=torch.float32)
    # torch's check of the schema computes with the inputs, and cannot with e4m3.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(overload, values, test_utils=checks)
    out = overload(*values)
    for index in (1, 3, 4, 5, 6):
        leaf = values[index].clone().requires_grad_()
        ours = quant_linear_residual(*values[:index], leaf, *values[index + 1 :])
        torch.testing.assert_close(ours, out)
        ours.square().sum().backward()
        doubles = [value.double() for value in values]
        exact = doubles[index].requires_grad_()
        formula(*doubles).square().sum().backward()
        assert leaf.grad is not None
        assert relative_error(leaf.grad, exact.grad) <= 1e-5


@pytest.mark.parametrize("stream_type", TYPES)
@pytest.mark.parametrize("dtype", EIGHT_BIT)
def test_op_runs_the_kernel(
    dtype: torch.dtype,
    stream_type: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    assert_rounded_once: Callable[[Tensor, Tensor], None],
) -> None:
    module = "wanx.kernels.quant_linear_residual"
    monkeypatch.setattr(f"{module}.runs_reference", lambda *_: False)
    monkeypatch.setattr(f"{module}.quant_linear_residual_reference", None)
    values = arguments(SIZES[1], dtype, stream_type=stream_type)
    out = quant_linear_residual(*(value.to(DEVICE) for value in values))
    assert (out.dtype, out.shape) == (stream_type, values[5].shape)
    assert_rounded_once(out.cpu(), exactly(values))
