"""Which implementation of the 8-bit linear runs on which GPU; tensors there need no memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support.interpreter import DEVICE
from wanx.kernels import quant_linear as module
from wanx.kernels.gemm_8bit import unsupported_reason
from wanx.kernels.launch_config import with_ranking
from wanx.kernels.quant_linear import (
    _choose,
    _run_torch,
    _run_triton,
    quant_linear_reference,
    runs_triton,
)

E4M3 = torch.float8_e4m3fn
FLOAT, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Within the test ``cuda`` is a GPU without memory; calling the fixture says which one."""

    def is_sm(sm: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: divmod(sm, 10))

    is_sm(90)
    with FakeTensorMode():
        yield is_sm


def operands(
    *,
    dtype: torch.dtype = E4M3,
    x_rows: bool = False,
    weight_rows: bool = True,
    bias_type: torch.dtype = BF16,
    k: int = 64,
    n: int = 48,
    device: str = "cuda",
) -> list[Tensor]:
    shapes = [
        ((2, 5, k), dtype), ((2, 5, 1) if x_rows else (), FLOAT), ((n, k), dtype),
        ((n,) if weight_rows else (), FLOAT), ((n,), bias_type),
    ]  # fmt: skip
    return [torch.empty(shape, dtype=kind, device=device) for shape, kind in shapes]


@pytest.mark.parametrize("x_rows", [False, True])
@pytest.mark.parametrize("weight_rows", [False, True])
@pytest.mark.parametrize("sm", [90, 100, 120])
def test_from_hopper_on_pytorch_multiplies_e4m3(
    sm: int, weight_rows: bool, x_rows: bool, gpu: Callable[[int], None]
) -> None:
    gpu(sm)
    assert _choose(*operands(x_rows=x_rows, weight_rows=weight_rows)) is _run_torch


@pytest.mark.parametrize("rows", [False, True])
def test_pytorch_accepts_the_shapes_and_strides(rows: bool, gpu: Callable[[int], None]) -> None:
    """By its own checks, which are stricter for GPUs."""
    out = _run_torch(*operands(x_rows=rows, weight_rows=rows))
    assert (out.shape, out.dtype) == ((2, 5, 48), BF16)


@pytest.mark.parametrize(
    "how",
    [
        {"dtype": torch.int8},
        {"bias_type": FLOAT},
        {"bias_type": torch.float16},
        {"k": 72},
        {"n": 40},
    ],
    ids=str,
)
def test_what_pytorch_cannot_multiply_goes_to_triton(
    how: dict[str, Any], gpu: Callable[[int], None]
) -> None:
    assert _choose(*operands(**how)) is _run_triton


def test_ada_scales_only_whole_tensors_with_pytorch(gpu: Callable[[int], None]) -> None:
    gpu(89)
    assert _choose(*operands()) is _run_triton
    assert _choose(*operands(x_rows=True, weight_rows=False)) is _run_triton
    assert _choose(*operands(weight_rows=False)) is _run_torch


def test_operands_that_are_not_aligned_go_to_triton(gpu: Callable[[int], None]) -> None:
    x8, *rest = operands()
    larger = torch.empty(2 * x8.numel(), dtype=E4M3, device="cuda")
    for stride, offset in (((320, 64, 1), 8), ((400, 80, 1), 0)):
        assert _choose(larger.as_strided(x8.shape, stride, offset), *rest) is _run_triton
    assert _choose(larger.as_strided(x8.shape, x8.stride(), 16), *rest) is _run_torch


def test_ampere_has_no_e4m3(gpu: Callable[[int], None]) -> None:
    gpu(80)
    assert _choose(*operands(dtype=torch.int8)) is _run_triton
    assert "SM89" in str(_choose(*operands()))


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (0, torch.zeros(2, 5, 64), "x8 is torch.float32"),
        (0, torch.zeros(2, 5, 63, dtype=torch.int8), r"x8 is [2, 5, 63] and weight8 [48, 64]"),
        (1, torch.zeros(7), "a scale is torch.float32 [7]"),
        (1, torch.zeros((), dtype=BF16), "a scale is torch.bfloat16"),
        (1, torch.zeros(1).expand(2, 5, 1), "a scale [2, 5, 1] is not contiguous"),
        (3, torch.zeros(47), "a scale is torch.float32 [47]"),
        (4, torch.zeros(47, dtype=BF16), "bias is torch.bfloat16 [47]"),
        (4, torch.zeros(48, dtype=torch.float64), "bias is torch.float64"),
    ],
)
def test_tensors_that_the_kernel_would_misread(
    index: int, wrong: Tensor, message: str, gpu: Callable[[int], None]
) -> None:
    values = operands(dtype=torch.int8, x_rows=True)
    assert unsupported_reason(*values) is None
    strides = wrong.stride()
    values[index] = torch.empty_strided(wrong.shape, strides, dtype=wrong.dtype, device="cuda")
    assert message in str(_choose(*values))


def test_sums_that_would_overflow(gpu: Callable[[int], None]) -> None:
    assert "131072 products" in (unsupported_reason(*operands(dtype=torch.int8, k=131072)) or "")
    assert unsupported_reason(*operands(k=131072)) is None


def test_epilogues_that_the_kernel_would_misread(gpu: Callable[[int], None]) -> None:
    def reason(**how: Any) -> str:
        return unsupported_reason(*operands(dtype=torch.int8), **how) or ""

    def empty(*shape: int, dtype: torch.dtype = FLOAT) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    assert reason(out_scale=empty(), dtype=torch.int8) == ""
    assert "[48]" in reason(out_scale=empty(48), dtype=torch.int8)
    residual, gate = empty(2, 5, 48), empty(2, 1, 48)
    for good in (gate, empty(1, 1, 48)):
        assert reason(residual=residual, gate=good) == ""
    assert "[2, 5, 47]" in reason(residual=empty(2, 5, 47), gate=gate)
    assert "not contiguous" in reason(residual=empty(5, 2, 48).transpose(0, 1), gate=gate)
    for wrong in (empty(3, 1, 48), empty(2, 5, 48), empty(2, 1, 48, dtype=BF16)):
        assert str(list(wrong.shape)) in reason(residual=residual, gate=wrong)
    gpu(80)
    assert "SM89" in reason(out_scale=empty(), dtype=E4M3)


@pytest.mark.parametrize("x_rows", [False, True])
@pytest.mark.parametrize("weight_rows", [False, True])
def test_pytorch_multiplies_as_the_reference_does(weight_rows: bool, x_rows: bool) -> None:
    """On the processor too, where nothing chooses it."""
    generator = torch.Generator().manual_seed(0)
    like = operands(x_rows=x_rows, weight_rows=weight_rows, device="cpu")
    values = [torch.rand(t.shape, generator=generator).to(t.dtype).to(DEVICE) for t in like]
    expected = quant_linear_reference(*values)
    torch.testing.assert_close(_run_torch(*values), expected, rtol=2.0**-7, atol=0)


@pytest.mark.parametrize("op", ["quant_linear", "quant_linear_rows"])
@pytest.mark.parametrize("dtype", [torch.int8, E4M3])
def test_ops_run_what_is_chosen(
    dtype: torch.dtype,
    op: str,
    monkeypatch: pytest.MonkeyPatch,
    assert_rounded_once: Callable[[Tensor, Tensor], None],
) -> None:
    """The kernel, whose result is told from the reference's by a scale that is doubled for it."""
    like = operands(dtype=dtype, x_rows=op == "quant_linear_rows", k=72, device="cpu")
    values = [(torch.arange(t.numel()) % 13 - 4).view(t.shape).to(t.dtype) for t in like]
    x8, x_scale, *layer = (value.to(DEVICE) for value in values)

    def doubled(x8: Tensor, x_scale: Tensor, *layer: Tensor) -> Tensor:
        return _run_triton(x8, x_scale * 2, *layer)

    monkeypatch.setattr(module, "_choose", lambda *_: doubled)
    out = getattr(module, op)(x8, x_scale, *layer)
    *weight, bias = layer
    exact = quant_linear_reference(x8, x_scale * 2, *weight, bias.float())
    assert (out.shape, out.dtype) == ((2, 5, 48), BF16)
    assert_rounded_once(out.cpu(), exact.double().cpu())


@pytest.mark.parametrize("op", ["quant_linear", "quant_linear_residual"])
def test_the_table_ranks_them(op: str, gpu: Callable[[int], None]) -> None:
    values = operands()
    with with_ranking(op, ["triton", "torch"]):
        assert _choose(*values, op) is _run_triton
        assert _choose(*values, "quant_linear_gelu_quantize") is _run_torch
        assert runs_triton(op, *values)
    assert _choose(*values, op) is _run_torch
    gpu(80)
    assert "FP8 needs SM89" in str(_choose(*values, op))
