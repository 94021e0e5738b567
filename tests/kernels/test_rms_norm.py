from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.interpreter import DEVICE
from tests.support.peers import relative_error
from wanx.kernels.rms_norm import RMSNorm, launch_rms_norm, rms_norm, rms_norm_reference

EPS = 0.05  # large enough to be seen
SHAPES = [(1, 1, 8), (1, 7, 72), (2, 5, 96), (1, 33, 128)]
# Rows shorter than a warp, and such as take more warps; any number of axes.
KERNEL_SHAPES = [*SHAPES, (5, 3), (2, 3, 2, 24), (2, 2100), (300,)]
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def formula(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def arguments(
    shape: tuple[int, ...],
    x_type: torch.dtype = torch.float32,
    weight_type: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 3 + 1
    weight = torch.randn(shape[-1], generator=generator)
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
    reference = rms_norm_reference(*values, EPS)
    (out,) = run_onnx(RMSNorm, values, eps=EPS)
    assert reference.dtype == x_type
    assert_rounded_once(reference, exact)
    assert_rounded_once(out.to(x_type), exact)
    assert relative_error(out, reference.float()) <= (1e-5 if x_type == torch.float32 else 0.03)


def test_rows_of_zeros_stay_zero(run_onnx: Callable[..., list[Tensor]]) -> None:
    x, weight = torch.zeros(1, 2, 16), torch.ones(16)
    for out in (rms_norm_reference(x, weight, EPS), *run_onnx(RMSNorm, (x, weight), eps=EPS)):
        assert torch.equal(out, x)


def test_a_large_bf16_row_does_not_lose_its_mean() -> None:
    """In bf16 the sum of 4096 equal squares would stop growing at 256 of them."""
    x = torch.ones(1, 1, 4096, dtype=torch.bfloat16)
    out = rms_norm(x, torch.ones(4096, dtype=torch.bfloat16), eps=1e-6)
    assert torch.equal(out, x)


@pytest.mark.parametrize("shape", SHAPES)
def test_op(shape: tuple[int, ...], check_op: Callable[..., None]) -> None:
    check_op(
        torch.ops.wanx.rms_norm.default,
        (*arguments(shape), EPS),
        lambda *tensors: rms_norm(*tensors, eps=EPS),
        formula,
    )


@pytest.mark.parametrize("weight_type", TYPES)
@pytest.mark.parametrize("x_type", TYPES)
@pytest.mark.parametrize("shape", KERNEL_SHAPES)
def test_kernel(
    shape: tuple[int, ...],
    x_type: torch.dtype,
    weight_type: torch.dtype,
    run_kernel: Callable[..., Tensor],
    assert_rounded_once: Callable[[Tensor, Tensor], None],
) -> None:
    x, weight = arguments(shape, x_type, weight_type)
    out = run_kernel(launch_rms_norm, x, weight, EPS)
    assert out.dtype == x_type
    assert_rounded_once(out, formula(x.double(), weight.double()))


def test_kernel_keeps_zeros_and_nan_in_their_rows(run_kernel: Callable[..., Tensor]) -> None:
    x, weight = arguments((1, 7, 72))
    clean = run_kernel(launch_rms_norm, x, weight, EPS)
    x[0, 1] = 0
    x[0, 2, 3] = torch.nan
    out = run_kernel(launch_rms_norm, x, weight, EPS)
    assert (out[0, 1] == 0).all()
    assert out[0, 2].isnan().all()
    others = [0, 3, 4, 5, 6]
    assert torch.equal(out[:, others], clean[:, others])


def test_kernel_does_not_lose_the_mean_of_a_large_bf16_row(
    run_kernel: Callable[..., Tensor],
) -> None:
    x = torch.ones(2, 4096, dtype=torch.bfloat16)
    assert torch.equal(run_kernel(launch_rms_norm, x, x[0], 1e-6), x)


def test_op_runs_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanx.kernels.rms_norm.runs_reference", lambda *_: False)
    x, weight = (value.to(DEVICE) for value in arguments((2, 5, 96), torch.bfloat16))
    assert torch.equal(rms_norm(x, weight, eps=EPS), launch_rms_norm(x, weight, EPS))
