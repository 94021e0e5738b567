from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.interpreter import DEVICE
from tests.support.onnx_runs import run_function
from wanx.kernels.adaln import launch_adaln
from wanx.kernels.adaln_quantize import (
    AdaLNQuantize,
    AdaLNQuantizeRows,
    adaln_quantize,
    adaln_quantize_reference,
    adaln_quantize_rows,
    adaln_quantize_rows_reference,
)
from wanx.kernels.registry import NODES, ONNX_TYPES

EPS = 0.05  # large enough to be seen
E4M3 = torch.float8_e4m3fn
SHAPES = [(1, 1, 8), (1, 7, 72), (2, 5, 96), (1, 33, 128)]
# Rows shorter than a warp, and such as take more warps; lengths with and without a remainder.
KERNEL_SHAPES = [*SHAPES, (1, 5, 3), (2, 8, 300), (1, 2, 2100)]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
QUANTISED = [torch.int8, E4M3]
STEP = {torch.int8: 0.0417, E4M3: 0.0083}


def formula(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    x, scale, shift = x.double(), scale.double(), shift.double()
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + EPS).sqrt() * (1 + scale) + shift


def row_scales(y: Tensor) -> Tensor:
    return y.abs().amax(-1, keepdim=True).clamp_min(448 * 2.0**-126) / 448


def arguments(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    batch, _, dim = shape
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * 2 + 3).to(dtype)
    scale, shift = (torch.randn(batch, 1, dim, generator=generator) for _ in range(2))
    return x, scale, shift


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("x_type", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_and_onnx_function(
    shape: tuple[int, ...],
    x_type: torch.dtype,
    dtype: torch.dtype,
    assert_rounded_to_8bit: Callable[[Tensor, Tensor], None],
) -> None:
    values, step = arguments(shape, x_type), torch.tensor(STEP[dtype])
    exact = formula(*values) / step.double()
    reference = adaln_quantize_reference(*values, step, EPS, dtype)
    assert reference.dtype == dtype
    assert_rounded_to_8bit(reference, exact)
    (out,) = run_function(AdaLNQuantize, [*values, step], eps=EPS, dtype=ONNX_TYPES[dtype])
    assert_rounded_to_8bit(out.to(dtype), exact)


@pytest.mark.parametrize("x_type", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_reference_and_onnx_function(
    shape: tuple[int, ...],
    x_type: torch.dtype,
    assert_rounded_to_8bit: Callable[[Tensor, Tensor], None],
) -> None:
    values = arguments(shape, x_type)
    exact = formula(*values)
    reference = adaln_quantize_rows_reference(*values, EPS)
    assert (reference[0].dtype, reference[1].dtype) == (E4M3, torch.float32)
    onnx = run_function(AdaLNQuantizeRows, list(values), outputs=2, eps=EPS)
    for q, scale in (reference, onnx):
        torch.testing.assert_close(scale.double(), row_scales(exact), rtol=1e-6, atol=0)
        assert_rounded_to_8bit(q.to(E4M3), exact / row_scales(exact))


@pytest.mark.parametrize("dtype", QUANTISED)
def test_op(dtype: torch.dtype) -> None:
    overload = torch.ops.wanx.adaln_quantize.default
    assert overload in NODES
    torch.library.opcheck(overload, (*arguments((2, 5, 24)), torch.tensor(0.3), EPS, dtype))


def test_rows_op() -> None:
    overload = torch.ops.wanx.adaln_quantize_rows.default
    assert overload in NODES
    torch.library.opcheck(overload, (*arguments((2, 5, 24)), EPS))


@pytest.mark.parametrize("shared", [False, True], ids=["each", "shared"])
@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("x_type", TYPES)
@pytest.mark.parametrize("shape", KERNEL_SHAPES)
def test_kernel(
    shape: tuple[int, ...],
    x_type: torch.dtype,
    dtype: torch.dtype,
    shared: bool,
    run_kernel: Callable[..., tuple[Tensor, ...]],
    assert_rounded_to_8bit: Callable[[Tensor, Tensor], None],
) -> None:
    x, scale, shift = arguments(shape, x_type)
    if shared:
        scale, shift = scale[:1], shift[:1]
    step = torch.tensor(STEP[dtype])
    _, q, _ = run_kernel(launch_adaln, x, scale, shift, EPS, dtype=dtype, q_scale=step)
    assert q.dtype == dtype
    assert_rounded_to_8bit(q, formula(x, scale, shift) / step.double())


@pytest.mark.parametrize("shared", [False, True], ids=["each", "shared"])
@pytest.mark.parametrize("x_type", TYPES)
@pytest.mark.parametrize("shape", KERNEL_SHAPES)
def test_rows_kernel(
    shape: tuple[int, ...],
    x_type: torch.dtype,
    shared: bool,
    run_kernel: Callable[..., tuple[Tensor, ...]],
    assert_rounded_to_8bit: Callable[[Tensor, Tensor], None],
) -> None:
    x, scale, shift = arguments(shape, x_type)
    if shared:
        scale, shift = scale[:1], shift[:1]
    exact = formula(x, scale, shift)
    _, q, found = run_kernel(launch_adaln, x, scale, shift, EPS, dtype=E4M3, by_row=True)
    assert (q.dtype, found.dtype) == (E4M3, torch.float32)
    torch.testing.assert_close(found.double(), row_scales(exact), rtol=1e-6, atol=0)
    assert_rounded_to_8bit(q, exact / row_scales(exact))


@pytest.mark.parametrize(
    ("dtype", "limits"), [(torch.int8, [-128, 127]), (E4M3, [-448, 448])], ids=["int8", "e4m3"]
)
def test_kernel_saturates(
    dtype: torch.dtype, limits: list[int], run_kernel: Callable[..., tuple[Tensor, ...]]
) -> None:
    x, scale, shift = arguments((1, 5, 72))
    shift[..., ::2], shift[..., 1::2] = -1e6, 1e6
    one = torch.tensor(1.0)
    _, q, _ = run_kernel(launch_adaln, x, scale, shift, EPS, dtype=dtype, q_scale=one)
    assert torch.equal(q.float(), torch.tensor(limits).float().repeat(36).expand_as(x))


@pytest.mark.parametrize("dtype", QUANTISED)
def test_kernel_divides_by_the_smallest_scales(
    dtype: torch.dtype,
    run_kernel: Callable[..., tuple[Tensor, ...]],
    assert_rounded_to_8bit: Callable[[Tensor, Tensor], None],
) -> None:
    """Whose inverse is infinite in fp32; the shift alone is as small."""
    x, scale, shift = arguments((2, 5, 72))
    scale, shift, step = torch.full_like(scale, -1), shift * 4e-39, torch.tensor(1e-40)
    _, q, _ = run_kernel(launch_adaln, x, scale, shift, EPS, dtype=dtype, q_scale=step)
    assert_rounded_to_8bit(q, shift.double().expand_as(x) / step.double())


@pytest.mark.parametrize("dtype", QUANTISED)
def test_kernel_makes_a_row_of_zeros_the_shift(
    dtype: torch.dtype,
    run_kernel: Callable[..., tuple[Tensor, ...]],
    assert_rounded_to_8bit: Callable[[Tensor, Tensor], None],
) -> None:
    x, scale, shift = arguments((1, 3, 72))
    x, step = torch.zeros_like(x), torch.tensor(STEP[dtype])
    _, q, _ = run_kernel(launch_adaln, x, scale, shift, EPS, dtype=dtype, q_scale=step)
    assert_rounded_to_8bit(q, (shift.double() / step.double()).expand_as(x))


def test_rows_kernel_keeps_a_row_of_zeros(run_kernel: Callable[..., tuple[Tensor, ...]]) -> None:
    x, scale, shift = arguments((1, 3, 72))
    x[0, 1] = 0
    shift = torch.zeros_like(shift)
    _, q, scales = run_kernel(launch_adaln, x, scale, shift, EPS, dtype=E4M3, by_row=True)
    assert (q[0, 1].float() == 0).all()
    torch.testing.assert_close(scales[0, 1].item(), 2.0**-126, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("dtype", "by_row"), [(torch.int8, False), (E4M3, False), (E4M3, True)],
    ids=["int8", "e4m3", "rows"],
)  # fmt: skip
def test_kernel_keeps_nan_in_its_token(
    dtype: torch.dtype, by_row: bool, run_kernel: Callable[..., tuple[Tensor, ...]]
) -> None:
    x, scale, shift = arguments((1, 7, 72))
    how = {"by_row": True} if by_row else {"q_scale": torch.tensor(STEP[dtype])}
    _, clean, clean_scales = run_kernel(launch_adaln, x, scale, shift, EPS, dtype=dtype, **how)
    x[0, 2, 3] = torch.nan
    _, q, scales = run_kernel(launch_adaln, x, scale, shift, EPS, dtype=dtype, **how)
    if dtype == E4M3:
        assert q[0, 2].float().isnan().all()
    others = torch.arange(7) != 2
    assert torch.equal(q.view(torch.uint8)[:, others], clean.view(torch.uint8)[:, others])
    if by_row:
        assert torch.equal(scales[:, others], clean_scales[:, others])


def test_ops_run_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanx.kernels.adaln_quantize.runs_reference", lambda *_: False)
    values = [value.to(DEVICE) for value in arguments((2, 5, 72), torch.bfloat16)]
    step = torch.tensor(0.0417, device=DEVICE)
    for dtype in QUANTISED:
        _, expected, _ = launch_adaln(*values, EPS, dtype=dtype, q_scale=step)
        q = adaln_quantize(*values, step, eps=EPS, dtype=dtype)
        assert q.dtype == dtype
        assert torch.equal(q.view(torch.uint8), expected.view(torch.uint8))
    _, expected, expected_scales = launch_adaln(*values, EPS, dtype=E4M3, by_row=True)
    q, scales = adaln_quantize_rows(*values, eps=EPS)
    assert torch.equal(q.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scales, expected_scales)
