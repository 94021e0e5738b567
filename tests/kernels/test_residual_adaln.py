from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.interpreter import DEVICE
from tests.support.onnx_runs import run_function
from wanx.kernels.adaln import launch_adaln
from wanx.kernels.registry import NODES, ONNX_TYPES
from wanx.kernels.residual_adaln import (
    ResidualAdaLN,
    ResidualAdaLNQuantize,
    residual_adaln,
    residual_adaln_quantize,
    residual_adaln_quantize_reference,
    residual_adaln_reference,
)

EPS = 0.05  # large enough to be seen
E4M3 = torch.float8_e4m3fn
SHAPES = [(1, 1, 8), (1, 7, 72), (2, 5, 96), (1, 33, 128)]
# Rows shorter than a warp, and such as take more warps; lengths with and without a remainder.
KERNEL_SHAPES = [*SHAPES, (1, 5, 3), (2, 8, 300), (1, 2, 2100)]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of the stream and of the sublayer's output.
PAIRS = [
    *((kind, kind) for kind in TYPES),
    *((torch.float32, kind) for kind in TYPES[1:]),
    (torch.bfloat16, torch.float32),
]
QUANTISED = [torch.int8, E4M3]
STEP = {torch.int8: 0.0417, E4M3: 0.0083}


def formula(
    x: Tensor, z: Tensor, gate: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    updated = x + z * gate
    centred = updated - updated.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return updated, centred / (variance + EPS).sqrt() * (1 + scale) + shift


def exactly(values: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    return formula(*(value.double() for value in values))


def arguments(
    shape: tuple[int, ...],
    x_type: torch.dtype = torch.float32,
    z_type: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:
    batch, _, dim = shape
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * 2 + 3).to(x_type)
    z = torch.randn(shape, generator=generator).to(z_type)
    return x, z, *(torch.randn(batch, 1, dim, generator=generator) for _ in range(3))


def run(
    run_kernel: Callable[..., tuple[Tensor, ...]], values: tuple[Tensor, ...], **how: object
) -> tuple[Tensor, Tensor]:
    x, z, gate, scale, shift = values
    updated, y, _ = run_kernel(launch_adaln, x, scale, shift, EPS, z=z, gate=gate, **how)
    return updated, y


@pytest.mark.parametrize(("x_type", "z_type"), PAIRS)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_and_onnx_function(
    shape: tuple[int, ...],
    x_type: torch.dtype,
    z_type: torch.dtype,
    run_onnx: Callable[..., list[Tensor]],
    assert_rounded_once: Callable[[Tensor, Tensor], None],
) -> None:
    values = arguments(shape, x_type, z_type)
    reference = residual_adaln_reference(*values, EPS)
    assert [out.dtype for out in reference] == [x_type, z_type]
    onnx = run_onnx(ResidualAdaLN, values, outputs=2, eps=EPS)
    for wanted, ours, theirs in zip(exactly(values), reference, onnx, strict=True):
        assert_rounded_once(ours, wanted)
        assert_rounded_once(theirs.to(ours.dtype), wanted)


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize(("x_type", "z_type"), PAIRS)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_reference_and_onnx_function(
    shape: tuple[int, ...],
    x_type: torch.dtype,
    z_type: torch.dtype,
    dtype: torch.dtype,
    assert_rounded_once: Callable[[Tensor, Tensor], None],
    assert_rounded_to_8bit: Callable[[Tensor, Tensor], None],
) -> None:
    values, step = arguments(shape, x_type, z_type), torch.tensor(STEP[dtype])
    exact_stream, exact_y = exactly(values)
    reference = residual_adaln_quantize_reference(*values, step, EPS, dtype)
    assert [out.dtype for out in reference] == [x_type, dtype]
    onnx = run_function(
        ResidualAdaLNQuantize, [*values, step], outputs=2, eps=EPS, dtype=ONNX_TYPES[dtype]
    )
    for updated, q in (reference, onnx):
        assert_rounded_once(updated.to(x_type), exact_stream)
        assert_rounded_to_8bit(q.to(dtype), exact_y / step.double())


@pytest.mark.parametrize("shape", SHAPES)
def test_op(shape: tuple[int, ...], check_op: Callable[..., None]) -> None:
    check_op(
        torch.ops.wanx.residual_adaln.default,
        (*arguments(shape), EPS),
        lambda *tensors: residual_adaln(*tensors, eps=EPS),
        formula,
    )


def test_op_of_two_dtypes() -> None:
    values = arguments((2, 5, 24), torch.float32, torch.bfloat16)
    torch.library.opcheck(torch.ops.wanx.residual_adaln.default, (*values, EPS))


@pytest.mark.parametrize("dtype", QUANTISED)
def test_quantize_op(dtype: torch.dtype) -> None:
    overload = torch.ops.wanx.residual_adaln_quantize.default
    assert overload in NODES
    values = arguments((2, 5, 24), torch.float32, torch.bfloat16)
    torch.library.opcheck(overload, (*values, torch.tensor(0.3), EPS, dtype))


@pytest.mark.parametrize("shared", [False, True], ids=["each", "shared"])
@pytest.mark.parametrize(("x_type", "z_type"), PAIRS)
@pytest.mark.parametrize("shape", KERNEL_SHAPES)
def test_kernel(
    shape: tuple[int, ...],
    x_type: torch.dtype,
    z_type: torch.dtype,
    shared: bool,
    run_kernel: Callable[..., tuple[Tensor, ...]],
    assert_rounded_once: Callable[[Tensor, Tensor], None],
) -> None:
    x, z, *modulation = arguments(shape, x_type, z_type)
    values = (x, z, *(m[:1] if shared else m for m in modulation))
    outs = run(run_kernel, values, dtype=z_type)
    assert [out.dtype for out in outs] == [x_type, z_type]
    for out, wanted in zip(outs, exactly(values), strict=True):
        assert_rounded_once(out, wanted)


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize(("x_type", "z_type"), PAIRS)
@pytest.mark.parametrize("shape", KERNEL_SHAPES)
def test_quantize_kernel(
    shape: tuple[int, ...],
    x_type: torch.dtype,
    z_type: torch.dtype,
    dtype: torch.dtype,
    run_kernel: Callable[..., tuple[Tensor, ...]],
    assert_rounded_once: Callable[[Tensor, Tensor], None],
    assert_rounded_to_8bit: Callable[[Tensor, Tensor], None],
) -> None:
    values, step = arguments(shape, x_type, z_type), torch.tensor(STEP[dtype])
    exact_stream, exact_y = exactly(values)
    updated, q = run(run_kernel, values, dtype=dtype, q_scale=step)
    assert (updated.dtype, q.dtype) == (x_type, dtype)
    assert_rounded_once(updated, exact_stream)
    assert_rounded_to_8bit(q, exact_y / step.double())


@pytest.mark.parametrize("apart", range(2, 5), ids=["gate", "scale", "shift"])
def test_kernel_takes_one_modulation_of_the_batch_among_others_of_each(
    apart: int,
    run_kernel: Callable[..., tuple[Tensor, ...]],
    assert_rounded_once: Callable[[Tensor, Tensor], None],
) -> None:
    values = list(arguments((2, 5, 96)))
    values[apart] = values[apart][:1]
    outs = run(run_kernel, tuple(values), dtype=torch.float32)
    for out, wanted in zip(outs, exactly(tuple(values)), strict=True):
        assert_rounded_once(out, wanted)


def test_the_norm_reads_the_stream_before_it_is_rounded(
    run_kernel: Callable[..., tuple[Tensor, ...]],
) -> None:
    """An update that is lost in a bf16 stream of 256 still shows in y."""
    x = torch.full((1, 1, 32), 256.0, dtype=torch.bfloat16)
    z = torch.tensor([0.5, -0.5]).repeat(16)[None, None]
    one, zero = torch.ones(1, 1, 32), torch.zeros(1, 1, 32)
    values = (x, z, one, zero, zero)
    expected = z / (0.25 + EPS) ** 0.5
    for updated, y in (
        residual_adaln_reference(*values, EPS),
        run(run_kernel, values, dtype=torch.float32),
    ):
        assert torch.equal(updated, x)
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(
    ("dtype", "limits"), [(torch.int8, [-128, 127]), (E4M3, [-448, 448])], ids=["int8", "e4m3"]
)
def test_kernel_saturates(
    dtype: torch.dtype, limits: list[int], run_kernel: Callable[..., tuple[Tensor, ...]]
) -> None:
    *others, shift = arguments((1, 5, 72))
    shift[..., ::2], shift[..., 1::2] = -1e6, 1e6
    _, q = run(run_kernel, (*others, shift), dtype=dtype, q_scale=torch.tensor(1.0))
    assert torch.equal(q.float(), torch.tensor(limits).float().repeat(36).expand(1, 5, 72))


def test_kernel_keeps_zeros_in_their_token(run_kernel: Callable[..., tuple[Tensor, ...]]) -> None:
    x, z, gate, scale, shift = arguments((1, 7, 72))
    x[0, 1], z[0, 1] = 0, 0
    updated, y = run(run_kernel, (x, z, gate, scale, shift), dtype=torch.float32)
    assert (updated[0, 1] == 0).all()
    torch.testing.assert_close(y[0, 1], shift[0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, E4M3])
def test_kernel_keeps_nan_in_its_token(
    dtype: torch.dtype, run_kernel: Callable[..., tuple[Tensor, ...]]
) -> None:
    x, z, *modulation = arguments((1, 7, 72))
    how = {"dtype": dtype} | ({"q_scale": torch.tensor(0.05)} if dtype != torch.float32 else {})
    clean_stream, clean = run(run_kernel, (x, z, *modulation), **how)
    z[0, 2, 3] = torch.nan
    updated, y = run(run_kernel, (x, z, *modulation), **how)
    assert updated.isnan().nonzero().tolist() == [[0, 2, 3]]
    others = torch.arange(7) != 2
    assert torch.equal(updated[:, others], clean_stream[:, others])
    assert torch.equal(y.view(torch.uint8)[:, others], clean.view(torch.uint8)[:, others])
    if dtype != torch.int8:
        assert y[0, 2].float().isnan().all()


def test_ops_run_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanx.kernels.residual_adaln.runs_reference", lambda *_: False)
    values = arguments((2, 5, 72), torch.float32, torch.bfloat16)
    x, z, gate, scale, shift = values = tuple(value.to(DEVICE) for value in values)
    step = torch.tensor(0.0417, device=DEVICE)
    expected = launch_adaln(x, scale, shift, EPS, dtype=z.dtype, z=z, gate=gate)
    for out, wanted in zip(residual_adaln(*values, eps=EPS), expected, strict=False):
        assert torch.equal(out, wanted)
    for dtype in QUANTISED:
        expected = launch_adaln(x, scale, shift, EPS, dtype=dtype, z=z, gate=gate, q_scale=step)
        updated, q = residual_adaln_quantize(*values, step, eps=EPS, dtype=dtype)
        assert torch.equal(updated, expected[0])
        assert torch.equal(q.view(torch.uint8), expected[1].view(torch.uint8))
