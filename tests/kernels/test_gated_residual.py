from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.interpreter import DEVICE
from tests.support.peers import relative_error
from wanx.kernels.gated_residual import (
    GatedResidual,
    gated_residual,
    gated_residual_reference,
    launch_gated_residual,
)

SHAPES = [(1, 1, 8), (1, 7, 72), (2, 5, 96), (1, 33, 128)]
# Rows shorter than a warp, and such as take several programs, with and without a remainder.
KERNEL_SHAPES = [*SHAPES, (1, 5, 3), (2, 8, 512), (2, 3, 1300)]
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def formula(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + y * gate


def arguments(
    shape: tuple[int, ...], x_type: torch.dtype, y_type: torch.dtype
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(shape, generator=generator) for _ in range(2))
    gate = torch.randn(shape[0], 1, shape[2], generator=generator)
    return x.to(x_type), y.to(y_type), gate


@pytest.mark.parametrize("y_type", TYPES)
@pytest.mark.parametrize("x_type", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_and_onnx_function(
    shape: tuple[int, ...],
    x_type: torch.dtype,
    y_type: torch.dtype,
    run_onnx: Callable[..., list[Tensor]],
    assert_rounded_once: Callable[[Tensor, Tensor], None],
) -> None:
    values = arguments(shape, x_type, y_type)
    exact = formula(*(value.double() for value in values))
    reference = gated_residual_reference(*values)
    (out,) = run_onnx(GatedResidual, values)
    assert reference.dtype == x_type
    assert_rounded_once(reference, exact)
    assert_rounded_once(out.to(x_type), exact)
    assert relative_error(out, reference.float()) <= (1e-5 if x_type == torch.float32 else 0.01)


def test_a_small_update_survives_in_a_large_stream() -> None:
    """The sum runs in fp32 even where the sublayer's output is bf16."""
    x = torch.full((1, 1, 4), 256.0)
    y = torch.full((1, 1, 4), 0.5, dtype=torch.bfloat16)
    gate = torch.full((1, 1, 4), 0.5)
    assert torch.equal(gated_residual(x, y, gate), torch.full_like(x, 256.25))


@pytest.mark.parametrize("shape", SHAPES)
def test_op(shape: tuple[int, ...], check_op: Callable[..., None]) -> None:
    check_op(
        torch.ops.wanx.gated_residual.default,
        arguments(shape, torch.float32, torch.float32),
        gated_residual,
        formula,
    )


@pytest.mark.parametrize("y_type", TYPES)
@pytest.mark.parametrize("x_type", TYPES)
@pytest.mark.parametrize("shape", KERNEL_SHAPES)
def test_kernel(
    shape: tuple[int, ...],
    x_type: torch.dtype,
    y_type: torch.dtype,
    run_kernel: Callable[..., Tensor],
    assert_rounded_once: Callable[[Tensor, Tensor], None],
) -> None:
    x, y, gates = arguments(shape, x_type, y_type)
    for gate in (gates, gates[:1]):
        out = run_kernel(launch_gated_residual, x, y, gate)
        assert out.dtype == x_type
        assert_rounded_once(out, formula(x.double(), y.double(), gate.double()))


def test_kernel_keeps_nan_in_its_element(run_kernel: Callable[..., Tensor]) -> None:
    x, y, gate = arguments((1, 7, 72), torch.float32, torch.bfloat16)
    clean = run_kernel(launch_gated_residual, x, y, gate)
    y[0, 2, 3] = torch.nan
    out = run_kernel(launch_gated_residual, x, y, gate)
    assert out.isnan().nonzero().tolist() == [[0, 2, 3]]
    assert torch.equal(out.nan_to_num(7.0), clean.where(~out.isnan(), 7.0))


def test_kernel_adds_nothing_to_the_stream_where_the_output_is_zero(
    run_kernel: Callable[..., Tensor],
) -> None:
    x, y, gate = arguments((1, 7, 72), torch.bfloat16, torch.bfloat16)
    assert torch.equal(run_kernel(launch_gated_residual, x, torch.zeros_like(y), gate), x)


def test_op_runs_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanx.kernels.gated_residual.runs_reference", lambda *_: False)
    values = arguments((2, 5, 96), torch.float32, torch.bfloat16)
    values = tuple(value.to(DEVICE) for value in values)
    assert torch.equal(gated_residual(*values), launch_gated_residual(*values))
