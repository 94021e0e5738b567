from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.support.interpreter import DEVICE
from tests.support.onnx_runs import run_function, traced
from wanx.exporter.components import GraphInput
from wanx.kernels.quantize import (
    QuantizeRows,
    launch_quantize,
    quantize,
    quantize_reference,
    quantize_rows,
    quantize_rows_reference,
)
from wanx.kernels.registry import NODES

E4M3 = torch.float8_e4m3fn
SHAPES = [(1, 1, 8), (1, 7, 130), (2, 5, 257), (33, 3)]
# Rows of one number, and such as take more warps.
KERNEL_SHAPES = [*SHAPES, (4, 1), (2, 2100)]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALES = [1e-40, 2.0**-126, 1e-6, 0.0173, 1.0, 3e4, 1e37]
NAN, INF = float("nan"), float("inf")


def codes(dtype: torch.dtype) -> Tensor:
    """Every finite number of an 8-bit type in rising order, in float64."""
    every = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).view(dtype).double()
    return every[every.isfinite()].unique()


def assert_nearest(q: Tensor, exact: Tensor) -> None:
    """No other code is nearer to the exact quotient, up to the rounding of fp32."""
    grid = codes(q.dtype)
    best = (grid - exact.flatten()[:, None].clamp(grid[0], grid[-1])).abs().amin(1)
    excess = (q.double().flatten() - exact.flatten().clamp(grid[0], grid[-1])).abs() - best
    assert (excess <= 1e-6 * exact.abs().flatten()).all()


def samples(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator) * 60).to(dtype)


class Quantize(nn.Module):
    def __init__(self, x_type: torch.dtype, dtype: torch.dtype) -> None:
        super().__init__()
        self.x_type, self.dtype = x_type, dtype
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x.to(self.x_type)
        # Three readers of one input, like q, k and v.
        return tuple(quantize(x, self.scale, self.dtype).float() * factor for factor in (1, 2, 4))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("x_type", TYPES)
@pytest.mark.parametrize("dtype", [torch.int8, E4M3])
@pytest.mark.parametrize("shape", SHAPES)
def test_nearest_code(
    shape: tuple[int, ...], dtype: torch.dtype, x_type: torch.dtype, scale: float
) -> None:
    step = torch.tensor(scale)
    x = (samples(shape).double() * step.double()).to(x_type)
    x = x.where(x.isfinite(), 0)
    q = quantize(x, step, dtype)
    assert (q.dtype, q.shape) == (dtype, x.shape)
    assert_nearest(q, x.double() / step.double())


@pytest.mark.parametrize("dtype", [torch.int8, E4M3])
def test_ties_go_to_the_even_code(dtype: torch.dtype) -> None:
    grid = codes(dtype)
    middle = ((grid[1:] + grid[:-1]) / 2).float()
    q = quantize(middle, torch.tensor(1.0), dtype)
    assert_nearest(q, middle.double())
    assert (q.view(torch.uint8) % 2 == 0).all()


@pytest.mark.parametrize("x_type", TYPES)
def test_saturation(x_type: torch.dtype) -> None:
    """torch's own cast to e4m3 makes NaN beyond the range, and its cast to int8 wraps around."""
    x = torch.tensor([127.5, 128.4, 1000.0, -128.5, -129.0, 6e4, INF, -INF]).to(x_type)
    q = quantize(x, torch.tensor(1.0), torch.int8)
    assert q.tolist() == [127, 127, 127, -128, -128, 127, 127, -128]
    x = torch.tensor([448.0, 464.0, 465.0, -480.0, 6e4, INF, -INF]).to(x_type)
    q = quantize(x, torch.tensor(1.0), E4M3)
    assert q.float().tolist() == [448, 448, 448, -448, 448, 448, -448]


def test_nan_stays_nan_in_e4m3() -> None:
    q = quantize(torch.tensor([1.0, NAN, -NAN]), torch.tensor(0.5), E4M3).float()
    assert q.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("dtype", "x_type"),
    [
        (torch.int8, torch.float32), (torch.int8, torch.bfloat16),
        (E4M3, torch.float32), (E4M3, torch.float16),
    ],
)  # fmt: skip
def test_onnx_is_equal_bit_for_bit(dtype: torch.dtype, x_type: torch.dtype, tmp_path: Path) -> None:
    """And stands in the graph as one standard node, whatever the number of its readers."""
    grid = codes(dtype).float()
    scale = torch.tensor(0.0173)
    edges = torch.cat([grid, (grid[1:] + grid[:-1]) / 2, grid * 1.3, grid * 1e4]) * scale
    edges = torch.cat([edges, torch.tensor([INF, -INF, -0.0, 1e-40])])
    x = torch.cat([edges, samples((4096 - len(edges),))])[None, :, None]
    graph = traced(
        lambda: Quantize(x_type, dtype), {"scale": scale},
        [GraphInput(name="x", shape=(1, "L", 1))], tmp_path, outputs=3,
    )  # fmt: skip
    (node,) = (n for n in graph.model.graph if n.op_type == "QuantizeLinear")
    assert (node.domain, graph.optimised.count("QuantizeLinear")) == ("", 1)
    expected = quantize_reference(x.to(x_type), scale, dtype).float()
    for out, factor in zip(graph.run(x), (1, 2, 4), strict=True):
        assert torch.equal(out, expected * factor)


@pytest.mark.parametrize("x_type", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows(shape: tuple[int, ...], x_type: torch.dtype) -> None:
    x = samples(shape) * torch.logspace(-3, 2, shape[-2])[:, None]
    x = x.to(x_type)
    q, scale = quantize_rows(x)
    assert (q.dtype, q.shape) == (E4M3, x.shape)
    assert (scale.dtype, scale.shape) == (torch.float32, (*shape[:-1], 1))
    torch.testing.assert_close(scale.double(), x.double().abs().amax(-1, keepdim=True) / 448)
    assert_nearest(q, x.double() / scale.double())
    assert (q.float().abs().amax(-1) == 448).all()
    onnx_q, onnx_scale = run_function(QuantizeRows, [x], outputs=2)
    assert torch.equal(onnx_q, q.float())
    assert torch.equal(onnx_scale, scale)


def test_rows_of_any_size() -> None:
    """From nothing through subnormal numbers to the largest ones, every row has a finite result."""
    row = samples((1, 19))
    x = row / row.abs().max() * torch.logspace(-45, 38, 84)[:, None]
    x = torch.cat([torch.zeros(1, 19), x])
    onnx_q, onnx_scale = run_function(QuantizeRows, [x], outputs=2)
    for q, scale in (quantize_rows(x), (onnx_q, onnx_scale)):
        back = q.double() * scale.double()
        assert back.isfinite().all()
        assert (scale >= 2.0**-126).all()
        assert (back[0] == 0).all()
        # Half a step of e4m3: 2⁻⁴ of a normal number, 2⁻¹⁰ among the smallest.
        assert (
            (back - x).abs() <= x.double().abs() * 2.0**-3.999 + scale.double() * 2.0**-10
        ).all()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_row_that_is_not_finite_stays_so(bad: float) -> None:
    x = samples((3, 10))
    x[1, 4] = bad
    for q, scale in (quantize_rows_reference(x), run_function(QuantizeRows, [x], outputs=2)):
        assert (q.double() * scale.double()).sum(-1).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.int8, E4M3])
def test_op(dtype: torch.dtype) -> None:
    overload = torch.ops.wanx.quantize.default
    assert overload in NODES
    torch.library.opcheck(overload, (samples((2, 5, 9)), torch.tensor(0.3), dtype))


def test_rows_op() -> None:
    overload = torch.ops.wanx.quantize_rows.default
    assert overload in NODES
    torch.library.opcheck(overload, (samples((2, 5, 9)),))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("x_type", TYPES)
@pytest.mark.parametrize("dtype", [torch.int8, E4M3])
def test_kernel_at_any_scale(
    dtype: torch.dtype,
    x_type: torch.dtype,
    scale: float,
    run_kernel: Callable[..., tuple[Tensor, Tensor]],
    assert_rounded_to_8bit: Callable[[Tensor, Tensor], None],
) -> None:
    step = torch.tensor(scale)
    x = (samples((2, 5, 257)).double() * step.double()).to(x_type)
    x = x.where(x.isfinite(), 0)
    q, _ = run_kernel(launch_quantize, x, step, dtype)
    assert q.dtype == dtype
    assert_rounded_to_8bit(q, x.double() / step.double())


@pytest.mark.parametrize("dtype", [torch.int8, E4M3])
@pytest.mark.parametrize("shape", KERNEL_SHAPES)
def test_kernel(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    run_kernel: Callable[..., tuple[Tensor, Tensor]],
    assert_rounded_to_8bit: Callable[[Tensor, Tensor], None],
) -> None:
    x, step = samples(shape), torch.tensor([0.173])
    q, _ = run_kernel(launch_quantize, x, step, dtype)
    assert_rounded_to_8bit(q, x.double() / step.double())


@pytest.mark.parametrize("dtype", [torch.int8, E4M3])
def test_kernel_rounds_ties_to_the_even_code(
    dtype: torch.dtype, run_kernel: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    grid = codes(dtype)
    middle = ((grid[1:] + grid[:-1]) / 2).float()
    q, _ = run_kernel(launch_quantize, middle, torch.tensor(1.0), dtype)
    assert_nearest(q, middle.double())
    assert (q.view(torch.uint8) % 2 == 0).all()


@pytest.mark.parametrize("x_type", TYPES)
def test_kernel_saturates(
    x_type: torch.dtype, run_kernel: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    one = torch.tensor(1.0)
    x = torch.tensor([127.5, 128.4, 1000.0, -128.5, -129.0, 6e4, INF, -INF]).to(x_type)
    q, _ = run_kernel(launch_quantize, x, one, torch.int8)
    assert q.tolist() == [127, 127, 127, -128, -128, 127, 127, -128]
    x = torch.tensor([448.0, 464.0, 465.0, -480.0, 6e4, INF, -INF]).to(x_type)
    q, _ = run_kernel(launch_quantize, x, one, E4M3)
    assert q.float().tolist() == [448, 448, 448, -448, 448, 448, -448]


@pytest.mark.parametrize("dtype", [torch.int8, E4M3])
def test_kernel_keeps_nan_in_its_element(
    dtype: torch.dtype, run_kernel: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    x, step = samples((3, 10)), torch.tensor(0.5)
    clean, _ = run_kernel(launch_quantize, x, step, dtype)
    bad = torch.zeros_like(x, dtype=torch.bool)
    bad[1, 4] = bad[2, 9] = True
    q, _ = run_kernel(launch_quantize, x.masked_fill(bad, NAN), step, dtype)
    assert torch.equal(q.view(torch.uint8)[~bad], clean.view(torch.uint8)[~bad])
    if dtype == E4M3:
        assert torch.equal(q.float().isnan(), bad)


@pytest.mark.parametrize("x_type", TYPES)
@pytest.mark.parametrize("shape", KERNEL_SHAPES)
def test_rows_kernel(
    shape: tuple[int, ...],
    x_type: torch.dtype,
    run_kernel: Callable[..., tuple[Tensor, Tensor]],
    assert_rounded_to_8bit: Callable[[Tensor, Tensor], None],
) -> None:
    x = samples(shape) * torch.logspace(-3, 2, shape[-2])[:, None]
    x = x.to(x_type)
    q, scale = run_kernel(launch_quantize, x, None, E4M3)
    assert (q.dtype, scale.dtype) == (E4M3, torch.float32)
    exact = x.double().abs().amax(-1, keepdim=True) / 448
    torch.testing.assert_close(scale.double(), exact, rtol=1e-6, atol=0)
    assert_rounded_to_8bit(q, x.double() / exact)


def test_rows_kernel_takes_rows_of_any_size(
    run_kernel: Callable[..., tuple[Tensor, Tensor]],
    assert_rounded_to_8bit: Callable[[Tensor, Tensor], None],
) -> None:
    """From nothing through subnormal numbers to the largest ones."""
    row = samples((1, 19))
    x = row / row.abs().max() * torch.logspace(-45, 38, 84)[:, None]
    x = torch.cat([torch.zeros(1, 19), x])
    q, scale = run_kernel(launch_quantize, x, None, E4M3)
    exact = x.double().abs().amax(-1, keepdim=True).clamp_min(448 * 2.0**-126) / 448
    torch.testing.assert_close(scale.double(), exact, rtol=1e-6, atol=0)
    assert (q.float()[0] == 0).all()
    assert_rounded_to_8bit(q, x.double() / exact)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_rows_kernel_keeps_a_row_that_is_not_finite_to_itself(
    bad: float, run_kernel: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    x = samples((3, 10))
    clean, clean_scale = run_kernel(launch_quantize, x, None, E4M3)
    x[1, 4] = bad
    q, scale = run_kernel(launch_quantize, x, None, E4M3)
    assert q.float()[1, 4].isnan()
    assert (q.double() * scale.double()).sum(-1).isnan().tolist() == [False, True, False]
    for row in (0, 2):
        assert torch.equal(q[row].view(torch.uint8), clean[row].view(torch.uint8))
        assert torch.equal(scale[row], clean_scale[row])


def test_ops_run_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanx.kernels.quantize.runs_reference", lambda *_: False)
    x, step = samples((2, 5, 9)).to(DEVICE), torch.tensor(0.3, device=DEVICE)
    for dtype in (torch.int8, E4M3):
        expected, _ = launch_quantize(x, step, dtype)
        assert torch.equal(quantize(x, step, dtype).view(torch.uint8), expected.view(torch.uint8))
    expected, expected_scale = launch_quantize(x, None, E4M3)
    q, scale = quantize_rows(x)
    assert torch.equal(q.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scale, expected_scale)
