from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peers import relative_error
from torch import Tensor

from wanx.kernels.gated_residual import GatedResidual, gated_residual, gated_residual_reference

SHAPES = [(1, 1, 8), (1, 7, 72), (2, 5, 96), (1, 33, 128)]
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
