from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.tuning.workloads import GEMMS
from tests.support.interpreter import DEVICE
from wanx.kernels.aot_compile import record
from wanx.kernels.gemm_8bit import launch_gemm_8bit
from wanx.kernels.launch_config import config, with_config

E4M3 = torch.float8_e4m3fn
EIGHT_BIT = [torch.int8, E4M3]
# Root mean square of the codes below.
SPREAD = {torch.int8: 74, E4M3: 259}
STEP = {torch.int8: 0.0417, E4M3: 0.0083}
SMALL = {
    "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 2, "num_warps": 4, "num_stages": 2,
}  # fmt: skip
# M, K, N: less than a block; tails of all; no tail in K; a group that is not full; whole blocks
SIZES = [(1, 7, 1), (5, 130, 7), (40, 96, 70), (65, 33, 33), (32, 64, 64)]
# Scales of rows of x8 and of weight8, or of the whole.
SCALES = [(False, True), (True, True), (True, False), (False, False)]
Size = tuple[int, int, int]


def codes(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    low, high = (-128, 127) if dtype == torch.int8 else (-448, 448)
    values = torch.rand(shape, generator=generator) * (high - low) + low
    return (values.round() if dtype == torch.int8 else values).to(dtype)


def arguments(
    size: Size,
    dtype: torch.dtype,
    *,
    x_rows: bool = False,
    weight_rows: bool = True,
    bias_type: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, ...]:
    """Such as make y about normal, where GELU is neither zero nor the identity."""
    m, k, n = size
    generator = torch.Generator().manual_seed(2)
    x_scale = torch.rand((m,) if x_rows else (), generator=generator) + 0.5
    weight_scale = torch.rand((n,) if weight_rows else (), generator=generator) + 0.5
    bias = torch.randn(n, generator=generator).to(bias_type)
    x_scale, weight_scale = x_scale / SPREAD[dtype], weight_scale / SPREAD[dtype] / k**0.5
    return codes((m, k), dtype, 0), x_scale, codes((n, k), dtype, 1), weight_scale, bias


def formula(
    x8: Tensor, x_scale: Tensor, weight8: Tensor, weight_scale: Tensor, bias: Tensor
) -> Tensor:
    x = x8.double() * x_scale.double().reshape(-1, 1)
    weight = weight8.double() * weight_scale.double().reshape(-1, 1)
    return torch.einsum("mk,nk->mn", x, weight) + bias.double()


def gelu(x: Tensor) -> Tensor:
    return x / 2 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


def stream(
    batch: int, length: int, n: int, dtype: torch.dtype, *, shared: bool = False
) -> tuple[Tensor, Tensor]:
    """A residual and its gate."""
    generator = torch.Generator().manual_seed(3)
    residual = torch.randn(batch, length, n, generator=generator).to(dtype)
    return residual, torch.randn(1 if shared else batch, 1, n, generator=generator)


def _launch_small(*values: Tensor, **following: Any) -> Tensor:
    """The kernel in small blocks, of which even small products have several."""
    with ExitStack() as stack:
        for op in (*GEMMS, "gemm_unaligned"):
            stack.enter_context(with_config(op, SMALL))
        return launch_gemm_8bit(*values, **following)


@pytest.mark.parametrize(("x_rows", "weight_rows"), SCALES)
@pytest.mark.parametrize("dtype", EIGHT_BIT)
@pytest.mark.parametrize("size", SIZES)
def test_product(
    size: Size,
    dtype: torch.dtype,
    x_rows: bool,
    weight_rows: bool,
    run_kernel: Callable[..., Tensor],
    assert_rounded_once: Callable[[Tensor, Tensor], None],
) -> None:
    how = {"x_rows": x_rows, "weight_rows": weight_rows, "bias_type": torch.float32}
    values = arguments(size, dtype, **how)
    out = run_kernel(_launch_small, *values)
    assert out.dtype == torch.float32
    assert_rounded_once(out, formula(*values))


@pytest.mark.parametrize("bias_type", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", EIGHT_BIT)
@pytest.mark.parametrize("size", [(5, 130, 7), (130, 144, 140)])
def test_default_tiles(
    size: Size,
    dtype: torch.dtype,
    bias_type: torch.dtype,
    run_kernel: Callable[..., Tensor],
    assert_rounded_once: Callable[[Tensor, Tensor], None],
) -> None:
    values = arguments(size, dtype, x_rows=True, bias_type=bias_type)
    out = run_kernel(launch_gemm_8bit, *values)
    assert out.dtype == bias_type
    assert_rounded_once(out, formula(*values))


@pytest.mark.parametrize("dtype", EIGHT_BIT)
def test_rows_that_lie_apart(
    dtype: torch.dtype,
    run_kernel: Callable[..., Tensor],
    assert_rounded_once: Callable[[Tensor, Tensor], None],
) -> None:
    x8, x_scale, weight8, *rest = arguments((40, 70, 35), dtype)
    apart = [
        torch.cat([codes((len(t), 5), dtype, 5), t, codes((len(t), 20), dtype, 6)], 1).to(DEVICE)
        for t in (x8, weight8)
    ]
    x, weight = (t[:, 5:75] for t in apart)
    out = run_kernel(_launch_small, x, x_scale, weight, *rest)
    assert_rounded_once(out, formula(x8, x_scale, weight8, *rest))


@pytest.mark.parametrize("out_type", EIGHT_BIT)
@pytest.mark.parametrize("dtype", EIGHT_BIT)
@pytest.mark.parametrize("size", SIZES[1:4])
def test_gelu_reads_the_sum_before_it_is_rounded(
    size: Size,
    dtype: torch.dtype,
    out_type: torch.dtype,
    run_kernel: Callable[..., Tensor],
    assert_rounded_to_8bit: Callable[[Tensor, Tensor], None],
) -> None:
    values, step = arguments(size, dtype), torch.tensor(STEP[out_type])
    how = {"out_scale": step, "dtype": out_type}
    q = run_kernel(_launch_small, *values, **how)
    assert q.dtype == out_type
    assert_rounded_to_8bit(q, gelu(formula(*values)) / step.double())


@pytest.mark.parametrize("stream_type", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", EIGHT_BIT)
@pytest.mark.parametrize(
    ("batch", "length", "shared"), [(1, 40, False), (3, 21, False), (3, 21, True), (2, 1, False)]
)
def test_residual_adds_the_sum_before_it_is_rounded(
    batch: int,
    length: int,
    shared: bool,
    dtype: torch.dtype,
    stream_type: torch.dtype,
    run_kernel: Callable[..., Tensor],
    assert_rounded_once: Callable[[Tensor, Tensor], None],
) -> None:
    values = arguments((batch * length, 45, 37), dtype)
    residual, gate = stream(batch, length, 37, stream_type, shared=shared)
    out = run_kernel(_launch_small, *values, residual=residual, gate=gate)
    assert (out.dtype, out.shape) == (stream_type, residual.shape)
    y = formula(*values).view(residual.shape)
    assert_rounded_once(out, residual.double() + y * gate.double())


@pytest.mark.parametrize("what", ["product", "gelu", "residual"])
def test_nan_stays_in_its_row(what: str, run_kernel: Callable[..., Tensor]) -> None:
    values = arguments((40, 70, 35), E4M3)
    residual, gate = stream(2, 20, 35, torch.float32)
    how = {
        "product": {},
        "gelu": {"out_scale": torch.tensor(STEP[E4M3]), "dtype": E4M3},
        "residual": {"residual": residual, "gate": gate},
    }[what]
    clean = run_kernel(_launch_small, *values, **how).float().view(40, 35)
    values[0][17, 69] = torch.nan
    out = run_kernel(_launch_small, *values, **how).float().view(40, 35)
    others = torch.arange(40) != 17
    assert out[17].isnan().all()
    assert torch.equal(out[others], clean[others])
    assert clean.isfinite().all()


def test_numbers_beyond_the_range_saturate(run_kernel: Callable[..., Tensor]) -> None:
    x8, x_scale, weight8, weight_scale, bias = arguments((5, 33, 4), torch.int8)
    bias = torch.tensor([1e4, -0.5, -0.75, 0.0])
    for dtype, limits in ((torch.int8, [127, -128, -128, 0]), (E4M3, [448, -448, -448, 0])):
        how = {"out_scale": torch.tensor(1e-4), "dtype": dtype}
        q = run_kernel(_launch_small, x8, x_scale * 0, weight8, weight_scale, bias, **how)
        assert q.float().tolist() == [limits] * 5


def test_tiles() -> None:
    """Each GPU runs with the widest blocks that its registers hold."""

    def tile(dtype: torch.dtype, sm: int, k: int = 64, *, residual: bool = False) -> dict[str, int]:
        values = (torch.empty(8, k, dtype=dtype), torch.ones(()), torch.empty(16, k, dtype=dtype))
        following = dict(zip(("residual", "gate"), stream(1, 8, 16, torch.float32), strict=True))
        others = (torch.ones(()), torch.ones(16, dtype=torch.bfloat16))
        how = following if residual else {}
        (launch,) = record(sm, launch_gemm_8bit, *values, *others, **how)
        return {name: (launch.constants | launch.options)[name] for name in SMALL}

    default = {
        "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "GROUP_M": 8,
        "num_warps": 8, "num_stages": 4,
    }  # fmt: skip
    wide = default | {"BLOCK_M": 256}
    for sm in (80, 86, 89, 103, 110, 120, 121):
        assert tile(torch.int8, sm) == default
    for sm in (90, 100):
        assert tile(torch.int8, sm) == wide
        assert tile(torch.int8, sm, residual=True) == default
    for sm in (89, 90, 120, 121):
        assert tile(E4M3, sm) == default
    for sm in (100, 103, 110):
        assert tile(E4M3, sm) == wide
        assert tile(E4M3, sm, residual=True) == default
    assert tile(E4M3, 90, 72) == config("gemm_unaligned", 90) != default


def test_every_variant_asks_for_its_own_entry() -> None:
    values = arguments((32, 64, 64), E4M3)
    residual, gate = stream(1, 32, 64, torch.float32)
    variants: dict[str, dict[str, Any]] = {
        "gemm_fp8": {},
        "gemm_fp8_gelu": {"out_scale": torch.tensor(1.0), "dtype": E4M3},
        "gemm_fp8_residual": {"residual": residual, "gate": gate},
    }
    for op, following in variants.items():
        with with_config(op, SMALL):
            used = {
                name: record(90, launch_gemm_8bit, *values, **how)[0].constants["BLOCK_M"]
                for name, how in variants.items()
            }
        assert [name for name, rows in used.items() if rows == SMALL["BLOCK_M"]] == [op], following
