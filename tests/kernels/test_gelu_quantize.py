from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.interpreter import DEVICE
from tests.support.onnx_runs import run_function
from wanx.kernels.gelu_quantize import (
    GeluQuantize,
    GeluQuantizeRows,
    gelu_quantize,
    gelu_quantize_reference,
    gelu_quantize_rows,
    gelu_quantize_rows_reference,
)
from wanx.kernels.quantize import launch_quantize
from wanx.kernels.registry import NODES, ONNX_TYPES

E4M3 = torch.float8_e4m3fn
SHAPES = [(1, 1, 8), (1, 7, 130), (2, 5, 257), (33, 3)]
# Rows of one number, and such as take more warps.
KERNEL_SHAPES = [*SHAPES, (4, 1), (2, 2100)]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
QUANTISED = [torch.int8, E4M3]
STEP = {torch.int8: 0.0417, E4M3: 0.0083}
NAN, INF = float("nan"), float("inf")


def formula(x: Tensor) -> Tensor:
    x = x.double()
    return x / 2 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


def row_scales(y: Tensor) -> Tensor:
    return y.abs().amax(-1, keepdim=True).clamp_min(448 * 2.0**-126) / 448


def samples(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator) * 2).to(dtype)


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("x_type", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_and_onnx_function(
    shape: tuple[int, ...],
    x_type: torch.dtype,
    dtype: torch.dtype,
    assert_rounded_to_8bit: Callable[[Tensor, Tensor], None],
) -> None:
    x, step = samples(shape, x_type), torch.tensor(STEP[dtype])
    exact = formula(x) / step.double()
    reference = gelu_quantize_reference(x, step, dtype)
    assert reference.dtype == dtype
    assert_rounded_to_8bit(reference, exact)
    (out,) = run_function(GeluQuantize, [x, step], dtype=ONNX_TYPES[dtype])
    assert_rounded_to_8bit(out.to(dtype), exact)


@pytest.mark.parametrize("x_type", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_reference_and_onnx_function(
    shape: tuple[int, ...],
    x_type: torch.dtype,
    assert_rounded_to_8bit: Callable[[Tensor, Tensor], None],
) -> None:
    x = samples(shape, x_type)
    exact = formula(x)
    reference = gelu_quantize_rows_reference(x)
    assert (reference[0].dtype, reference[1].dtype) == (E4M3, torch.float32)
    for q, scale in (reference, run_function(GeluQuantizeRows, [x], outputs=2)):
        torch.testing.assert_close(scale.double(), row_scales(exact), rtol=1e-6, atol=0)
        assert_rounded_to_8bit(q.to(E4M3), exact / row_scales(exact))


@pytest.mark.parametrize("dtype", QUANTISED)
def test_op(dtype: torch.dtype) -> None:
    overload = torch.ops.wanx.gelu_quantize.default
    assert overload in NODES
    torch.library.opcheck(overload, (samples((2, 5, 9)), torch.tensor(0.3), dtype))


def test_rows_op() -> None:
    overload = torch.ops.wanx.gelu_quantize_rows.default
    assert overload in NODES
    torch.library.opcheck(overload, (samples((2, 5, 9)),))


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("x_type", TYPES)
@pytest.mark.parametrize("shape", KERNEL_SHAPES)
def test_kernel(
    shape: tuple[int, ...],
    x_type: torch.dtype,
    dtype: torch.dtype,
    run_kernel: Callable[..., tuple[Tensor, Tensor]],
    assert_rounded_to_8bit: Callable[[Tensor, Tensor], None],
) -> None:
    x, step = samples(shape, x_type), torch.tensor(STEP[dtype])
    q, _ = run_kernel(launch_quantize, x, step, dtype, gelu=True)
    assert q.dtype == dtype
    assert_rounded_to_8bit(q, formula(x) / step.double())


@pytest.mark.parametrize("x_type", TYPES)
@pytest.mark.parametrize("shape", KERNEL_SHAPES)
def test_rows_kernel(
    shape: tuple[int, ...],
    x_type: torch.dtype,
    run_kernel: Callable[..., tuple[Tensor, Tensor]],
    assert_rounded_to_8bit: Callable[[Tensor, Tensor], None],
) -> None:
    x = samples(shape, x_type)
    exact = formula(x)
    q, scale = run_kernel(launch_quantize, x, None, E4M3, gelu=True)
    assert (q.dtype, scale.dtype) == (E4M3, torch.float32)
    torch.testing.assert_close(scale.double(), row_scales(exact), rtol=1e-6, atol=0)
    assert_rounded_to_8bit(q, exact / row_scales(exact))


@pytest.mark.parametrize("dtype", QUANTISED)
def test_kernel_follows_gelu_into_its_tails(
    dtype: torch.dtype,
    run_kernel: Callable[..., tuple[Tensor, Tensor]],
    assert_rounded_to_8bit: Callable[[Tensor, Tensor], None],
) -> None:
    """From where gelu is zero to where it is x, without overflow of x³."""
    x = torch.cat([torch.linspace(-30, 30, 1201), torch.tensor([1e4, -1e4, 1e30, -1e30, 3e38])])
    step = torch.tensor(STEP[dtype])
    q, _ = run_kernel(launch_quantize, x[None], step, dtype, gelu=True)
    assert_rounded_to_8bit(q, formula(x[None]) / step.double())


def test_kernel_does_not_cancel_far_below_zero(
    run_kernel: Callable[..., tuple[Tensor, Tensor]],
    assert_rounded_to_8bit: Callable[[Tensor, Tensor], None],
) -> None:
    """Each row has a scale of its own, so that none is lost beside the others."""
    x = torch.linspace(-9.5, -4, 23)[:, None] * torch.linspace(1, 1.02, 64)
    wide = x.double()
    # As 1 + tanh u = 2 sigmoid(2u), where the formula cancels even in float64.
    exact = wide * (2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)).sigmoid()
    q, scale = run_kernel(launch_quantize, x, None, E4M3, gelu=True)
    rows = row_scales(exact)
    torch.testing.assert_close(scale.double(), rows, rtol=5e-5, atol=0)
    assert_rounded_to_8bit(q, exact / rows)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.int8, 127), (E4M3, 448)], ids=["int8", "e4m3"])
def test_kernel_saturates(
    dtype: torch.dtype, limit: int, run_kernel: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    """On both sides, for which the scale has to be small: gelu falls to no more than -0.17."""
    x = torch.tensor([[1.0, 3e4, INF, -0.75, -0.5, 0.0]])
    q, _ = run_kernel(launch_quantize, x, torch.tensor(1e-4), dtype, gelu=True)
    low = -limit - (dtype == torch.int8)
    assert q.float().tolist() == [[limit, limit, limit, low, low, 0]]


def test_rows_kernel_keeps_a_row_of_zeros(
    run_kernel: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    x = samples((3, 10))
    x[1] = 0
    q, scale = run_kernel(launch_quantize, x, None, E4M3, gelu=True)
    assert (q[1].float() == 0).all()
    torch.testing.assert_close(scale[1].item(), 2.0**-126, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("dtype", "step"),
    [(torch.int8, torch.tensor(0.05)), (E4M3, torch.tensor(0.05)), (E4M3, None)],
    ids=["int8", "e4m3", "rows"],
)
def test_kernel_keeps_nan_in_its_row(
    dtype: torch.dtype, step: Tensor | None, run_kernel: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    x = samples((3, 10))
    clean, _ = run_kernel(launch_quantize, x, step, dtype, gelu=True)
    x[1, 4] = NAN
    q, _ = run_kernel(launch_quantize, x, step, dtype, gelu=True)
    others = [0, 2]
    assert torch.equal(q.view(torch.uint8)[others], clean.view(torch.uint8)[others])
    if dtype == E4M3:
        assert q[1, 4].float().isnan()
    if step is not None:
        rest = torch.arange(10) != 4
        assert torch.equal(q[1].view(torch.uint8)[rest], clean[1].view(torch.uint8)[rest])


def test_ops_run_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanx.kernels.gelu_quantize.runs_reference", lambda *_: False)
    x, step = samples((2, 5, 9), torch.bfloat16).to(DEVICE), torch.tensor(0.03, device=DEVICE)
    for dtype in QUANTISED:
        expected, _ = launch_quantize(x, step, dtype, gelu=True)
        q = gelu_quantize(x, step, dtype)
        assert q.dtype == dtype
        assert torch.equal(q.view(torch.uint8), expected.view(torch.uint8))
    expected, expected_scale = launch_quantize(x, None, E4M3, gelu=True)
    q, scale = gelu_quantize_rows(x)
    assert torch.equal(q.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scale, expected_scale)
