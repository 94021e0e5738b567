from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from tests.support.interpreter import DEVICE
from tests.support.peers import relative_error
from wanx.exporter.components import ComponentSpec, GraphInput
from wanx.exporter.graph.trace import trace
from wanx.kernels.adaln import AdaLN, adaln, adaln_reference, launch_adaln

EPS = 0.05  # large enough to be seen
SHAPES = [(1, 1, 8), (1, 7, 72), (2, 5, 96), (1, 33, 128)]
# Rows shorter than a warp, and such as take more warps; lengths with and without a remainder.
KERNEL_SHAPES = [*SHAPES, (1, 5, 3), (2, 8, 300), (1, 2, 2100)]
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def formula(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + EPS).sqrt() * (1 + scale) + shift


def arguments(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    batch, _, dim = shape
    generator = torch.Generator().manual_seed(0)
    # Far from zero mean, so that the statistics matter.
    x = (torch.randn(shape, generator=generator) * 2 + 3).to(dtype)
    scale, shift = (torch.randn(batch, 1, dim, generator=generator) for _ in range(2))
    return x, scale, shift


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    assert_rounded_once: Callable[[Tensor, Tensor], None],
) -> None:
    x, scale, shift = arguments(shape, dtype)
    out = adaln_reference(x, scale, shift, EPS)
    assert out.dtype == dtype
    assert_rounded_once(out, formula(x.double(), scale.double(), shift.double()))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_onnx_function(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    run_onnx: Callable[..., list[Tensor]],
    assert_rounded_once: Callable[[Tensor, Tensor], None],
) -> None:
    values = arguments(shape, dtype)
    (out,) = run_onnx(AdaLN, values, eps=EPS)
    exact = formula(*(value.double() for value in values))
    assert_rounded_once(out.to(dtype), exact)
    if dtype == torch.float32:
        assert relative_error(out, adaln_reference(*values, EPS)) <= 1e-5


def test_constant_row_is_the_shift(run_onnx: Callable[..., list[Tensor]]) -> None:
    """Without eps, a row of no variance would be 0/0."""
    x, scale, shift = arguments((1, 3, 16))
    x = torch.full_like(x, 5.0)
    for out in (
        adaln_reference(x, scale, shift, EPS),
        *run_onnx(AdaLN, (x, scale, shift), eps=EPS),
    ):
        torch.testing.assert_close(out, shift.expand_as(x))


@pytest.mark.parametrize("shape", SHAPES)
def test_op(shape: tuple[int, ...], check_op: Callable[..., None]) -> None:
    check_op(
        torch.ops.wanx.adaln.default,
        (*arguments(shape), EPS),
        lambda *tensors: adaln(*tensors, eps=EPS),
        formula,
    )


@pytest.mark.parametrize("wanted", TYPES)
@pytest.mark.parametrize("given", TYPES)
def test_op_rounds_once_to_another_type(
    given: torch.dtype,
    wanted: torch.dtype,
    assert_rounded_once: Callable[[Tensor, Tensor], None],
) -> None:
    values = arguments((2, 5, 96), given)
    torch.library.opcheck(torch.ops.wanx.adaln_to.default, (*values, EPS, wanted))
    exact = formula(*(value.double() for value in values))
    for out in (
        adaln(*values, eps=EPS, dtype=wanted),
        adaln(*(v.requires_grad_() for v in values), eps=EPS, dtype=wanted).detach(),
    ):
        assert out.dtype == wanted
        assert_rounded_once(out, exact.detach())


def test_another_type_is_the_same_node_and_a_cast() -> None:
    class Normalise(torch.nn.Module):
        def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            return adaln(x, scale, shift, eps=EPS, dtype=torch.bfloat16)

    shapes = {"x": (1, "L", 16), "scale": (1, 1, 16), "shift": (1, 1, 16)}
    spec = ComponentSpec(
        name="normalise", weights="none", build=Normalise, outputs=("y",), axes={"L": 24},
        inputs=tuple(GraphInput(name=n, shape=shape) for n, shape in shapes.items()),
    )  # fmt: skip
    model = trace(spec)
    assert [node.op_type for node in model.graph] == ["AdaLN", "Cast"]
    assert model.graph.outputs[0].dtype == ir.DataType.BFLOAT16


@pytest.mark.parametrize("shared", [False, True], ids=["each", "shared"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", KERNEL_SHAPES)
def test_kernel(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    shared: bool,
    run_kernel: Callable[..., tuple[Tensor, ...]],
    assert_rounded_once: Callable[[Tensor, Tensor], None],
) -> None:
    x, scale, shift = arguments(shape, dtype)
    if shared:
        scale, shift = scale[:1], shift[:1]
    _, out, _ = run_kernel(launch_adaln, x, scale, shift, EPS, dtype=dtype)
    assert out.dtype == dtype
    assert_rounded_once(out, formula(x.double(), scale.double(), shift.double()))


def test_kernel_takes_one_modulation_of_the_batch_and_one_of_each(
    run_kernel: Callable[..., tuple[Tensor, ...]],
    assert_rounded_once: Callable[[Tensor, Tensor], None],
) -> None:
    x, scale, shift = arguments((2, 5, 96))
    for values in ((x, scale[:1], shift), (x, scale, shift[:1])):
        _, out, _ = run_kernel(launch_adaln, *values, EPS, dtype=x.dtype)
        assert_rounded_once(out, formula(*(value.double() for value in values)))


@pytest.mark.parametrize("dtype", TYPES)
def test_kernel_rounds_once(
    dtype: torch.dtype,
    run_kernel: Callable[..., tuple[Tensor, ...]],
    assert_rounded_once: Callable[[Tensor, Tensor], None],
) -> None:
    """From fp32 to the dtype of the result, as the next linear wants it."""
    values = arguments((2, 5, 96))
    _, out, _ = run_kernel(launch_adaln, *values, EPS, dtype=dtype)
    assert out.dtype == dtype
    assert_rounded_once(out, formula(*(value.double() for value in values)))


def test_kernel_makes_a_constant_row_the_shift(
    run_kernel: Callable[..., tuple[Tensor, ...]],
) -> None:
    x, scale, shift = arguments((1, 3, 48))
    for constant in (0.0, 5.0):
        x = torch.full_like(x, constant)
        _, out, _ = run_kernel(launch_adaln, x, scale, shift, EPS, dtype=x.dtype)
        torch.testing.assert_close(out, shift.expand_as(x))


def test_kernel_keeps_nan_in_its_token(run_kernel: Callable[..., tuple[Tensor, ...]]) -> None:
    x, scale, shift = arguments((1, 7, 72))
    _, clean, _ = run_kernel(launch_adaln, x, scale, shift, EPS, dtype=x.dtype)
    x[0, 2, 3] = torch.nan
    _, out, _ = run_kernel(launch_adaln, x, scale, shift, EPS, dtype=x.dtype)
    assert out[0, 2].isnan().all()
    others = torch.arange(7) != 2
    assert torch.equal(out[:, others], clean[:, others])


def test_op_runs_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanx.kernels.adaln.runs_reference", lambda *_: False)
    values = [value.to(DEVICE) for value in arguments((2, 5, 96), torch.bfloat16)]
    _, expected, _ = launch_adaln(*values, EPS, dtype=torch.bfloat16)
    assert torch.equal(adaln(*values, eps=EPS), expected)
