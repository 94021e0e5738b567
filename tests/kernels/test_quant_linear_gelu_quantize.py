from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.interpreter import DEVICE
from tests.support.onnx_runs import run_function
from wanx.kernels.gelu_quantize import gelu_quantize_reference
from wanx.kernels.quant_linear import quant_linear_reference
from wanx.kernels.quant_linear_gelu_quantize import (
    QuantLinearGeluQuantize,
    quant_linear_gelu_quantize,
    quant_linear_gelu_quantize_reference,
)
from wanx.kernels.quantize import quantize_reference
from wanx.kernels.registry import NODES, ONNX_TYPES

E4M3 = torch.float8_e4m3fn
EIGHT_BIT = [torch.int8, E4M3]
STEP = {torch.int8: 0.0417, E4M3: 0.0083}
# (leading sizes, K, N)
SIZES = [((1, 1), 7, 5), ((2, 33), 57, 70), ((4,), 64, 97)]
Size = tuple[tuple[int, ...], int, int]


def arguments(
    size: Size,
    dtype: torch.dtype,
    out_type: torch.dtype,
    *,
    per_tensor: bool = False,
    bias_type: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, ...]:
    """Such as make y about normal."""
    leading, k, n = size
    generator = torch.Generator().manual_seed(0)
    x_scale, step = torch.tensor(0.031), torch.tensor(STEP[out_type])
    x8 = quantize_reference(torch.randn(*leading, k, generator=generator), x_scale, dtype)
    weight_scale = torch.rand(() if per_tensor else (n,), generator=generator) * 0.01 + 0.01
    weight = torch.randn(n, k, generator=generator) / k**0.5 * 1.5
    weight8 = quantize_reference(weight, weight_scale.reshape(-1, 1), dtype)
    bias = torch.randn(n, generator=generator).to(bias_type)
    return x8, x_scale, weight8, weight_scale, bias, step


def formula(*values: Tensor) -> Tensor:
    x8, x_scale, weight8, weight_scale, bias, step = (value.double() for value in values)
    scale = weight_scale.expand(len(weight8))
    y = torch.einsum("...k,nk,n->...n", x8 * x_scale, weight8, scale) + bias
    return y / 2 * (1 + (math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)).tanh()) / step


@pytest.mark.parametrize("bias_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out_type", EIGHT_BIT)
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("dtype", EIGHT_BIT)
@pytest.mark.parametrize("size", SIZES)
def test_reference_and_onnx_function(
    size: Size,
    dtype: torch.dtype,
    per_tensor: bool,
    out_type: torch.dtype,
    bias_type: torch.dtype,
    assert_rounded_to_8bit: Callable[[Tensor, Tensor], None],
) -> None:
    values = arguments(size, dtype, out_type, per_tensor=per_tensor, bias_type=bias_type)
    exact = formula(*values)
    reference = quant_linear_gelu_quantize_reference(*values, out_type)
    assert reference.dtype == out_type
    assert_rounded_to_8bit(reference, exact)
    (out,) = run_function(QuantLinearGeluQuantize, values, dtype=ONNX_TYPES[out_type])
    assert_rounded_to_8bit(out.to(out_type), exact)


def test_without_rounding_in_between_it_is_one_op_after_the_other() -> None:
    """With a bias in fp32 the same codes, with one in bf16 such as two roundings make differ."""
    for bias_type, same in ((torch.float32, True), (torch.bfloat16, False)):
        *layer, step = arguments(SIZES[1], E4M3, torch.int8, bias_type=bias_type)
        two = gelu_quantize_reference(quant_linear_reference(*layer), step, torch.int8)
        one = quant_linear_gelu_quantize(*layer, step, torch.int8)
        assert torch.equal(one, two) == same


@pytest.mark.parametrize("out_type", EIGHT_BIT)
def test_op(out_type: torch.dtype) -> None:
    overload = torch.ops.wanx.quant_linear_gelu_quantize.default
    assert overload in NODES
    values = arguments(SIZES[1], out_type, out_type)
    # torch's check of the schema computes with the inputs, and cannot with e4m3.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(overload, (*values, out_type), test_utils=checks)


@pytest.mark.parametrize("dtype", EIGHT_BIT)
def test_op_runs_the_kernel(
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    assert_rounded_to_8bit: Callable[[Tensor, Tensor], None],
) -> None:
    module = "wanx.kernels.quant_linear_gelu_quantize"
    monkeypatch.setattr(f"{module}.runs_reference", lambda *_: False)
    monkeypatch.setattr(f"{module}.quant_linear_gelu_quantize_reference", None)
    values = arguments(SIZES[1], dtype, dtype)
    q = quant_linear_gelu_quantize(*(value.to(DEVICE) for value in values), dtype)
    assert q.dtype == dtype
    assert_rounded_to_8bit(q.cpu(), formula(*values))
