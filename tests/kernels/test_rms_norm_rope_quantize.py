from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.interpreter import DEVICE
from tests.support.onnx_runs import run_function
from wanx.kernels.registry import NODES
from wanx.kernels.rms_norm_rope import launch_rms_norm_rope
from wanx.kernels.rms_norm_rope_quantize import (
    RMSNormRopeQuantize,
    rms_norm_rope_quantize,
    rms_norm_rope_quantize_reference,
)

EPS = 0.05  # large enough to be seen
E4M3 = torch.float8_e4m3fn
# (batch, length, heads, width of a head)
SIZES = [(1, 1, 1, 24), (1, 7, 3, 24), (2, 5, 2, 32), (1, 13, 1, 128), (1, 9, 5, 6)]
# Heads of which the kernel makes blocks: their width is a power of two, their number any.
KERNEL_SIZES = [(1, 1, 1, 16), (1, 7, 3, 32), (2, 5, 2, 64), (1, 3, 12, 128), (2, 4, 5, 16)]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
STEPS = (0.0083, 0.0291)  # of q and of k


def turned(x: Tensor, weight: Tensor, turn: Tensor, heads: int) -> Tensor:
    normed = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    pairs = torch.view_as_complex(normed.unflatten(-1, (heads, -1, 2)))
    return torch.view_as_real(pairs * turn[:, None, :]).flatten(-3)


def quotients(values: tuple[Tensor, ...], heads: int) -> tuple[Tensor, Tensor]:
    """What is left to be rounded, in float64."""
    q, k, q_weight, k_weight, cos, sin, q_scale, k_scale = (value.double() for value in values)
    turn = torch.complex(cos, sin)
    return turned(q, q_weight, turn, heads) / q_scale, turned(k, k_weight, turn, heads) / k_scale


def arguments(
    size: tuple[int, int, int, int], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    batch, length, heads, width = size
    generator = torch.Generator().manual_seed(0)
    q, k = (
        (torch.randn(batch, length, heads * width, generator=generator) * 2 + 0.5).to(dtype)
        for _ in range(2)
    )
    weights = (torch.randn(heads * width, generator=generator).to(dtype) for _ in range(2))
    angles = torch.rand(length, width // 2, generator=generator) * 6.28
    return q, k, *weights, angles.cos(), angles.sin(), *(torch.tensor(step) for step in STEPS)


def run(
    run_kernel: Callable[..., tuple[Tensor, Tensor]], values: tuple[Tensor, ...], heads: int
) -> tuple[Tensor, Tensor]:
    *others, q_scale, k_scale = values
    return run_kernel(launch_rms_norm_rope, *others, heads, EPS, (q_scale, k_scale))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", SIZES)
def test_reference_and_onnx_function(
    size: tuple[int, int, int, int],
    dtype: torch.dtype,
    assert_rounded_to_8bit: Callable[[Tensor, Tensor], None],
) -> None:
    heads, values = size[2], arguments(size, dtype)
    reference = rms_norm_rope_quantize_reference(*values, heads, EPS)
    onnx = run_function(RMSNormRopeQuantize, values, outputs=2, num_heads=heads, eps=EPS)
    for wanted, ours, theirs in zip(quotients(values, heads), reference, onnx, strict=True):
        assert ours.dtype == E4M3
        assert_rounded_to_8bit(ours, wanted)
        assert_rounded_to_8bit(theirs.to(E4M3), wanted)


@pytest.mark.parametrize("size", SIZES)
def test_op(size: tuple[int, int, int, int]) -> None:
    overload = torch.ops.wanx.rms_norm_rope_quantize.default
    assert overload in NODES
    torch.library.opcheck(overload, (*arguments(size), size[2], EPS))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", KERNEL_SIZES)
def test_kernel(
    size: tuple[int, int, int, int],
    dtype: torch.dtype,
    run_kernel: Callable[..., tuple[Tensor, Tensor]],
    assert_rounded_to_8bit: Callable[[Tensor, Tensor], None],
) -> None:
    heads, values = size[2], arguments(size, dtype)
    outs = run(run_kernel, values, heads)
    for out, wanted in zip(outs, quotients(values, heads), strict=True):
        assert out.dtype == E4M3
        assert_rounded_to_8bit(out, wanted)


@pytest.mark.parametrize("dtype", TYPES)
def test_kernel_takes_rows_that_lie_apart(
    dtype: torch.dtype, run_kernel: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    q, k, *others = arguments((2, 5, 3, 32), dtype)
    expected = run(run_kernel, (q, k, *others), 3)
    packed = torch.cat([q, k, torch.full_like(q, torch.nan)], -1).to(DEVICE)
    packed_q, packed_k, _ = packed.split(96, -1)
    outs = run(run_kernel, (packed_q, packed_k, *others), 3)
    for out, wanted in zip(outs, expected, strict=True):
        assert out.is_contiguous()
        assert torch.equal(out.view(torch.uint8), wanted.view(torch.uint8))


def test_kernel_divides_by_the_smallest_scales(
    run_kernel: Callable[..., tuple[Tensor, Tensor]],
    assert_rounded_to_8bit: Callable[[Tensor, Tensor], None],
) -> None:
    """Whose inverse is infinite in fp32."""
    q, k, q_weight, k_weight, cos, sin, _, _ = arguments((1, 7, 3, 32))
    tiny = torch.tensor(1e-40)
    values = (q, k, q_weight * 1e-38, k_weight * 1e-38, cos, sin, tiny, tiny)
    outs = run(run_kernel, values, 3)
    for out, wanted in zip(outs, quotients(values, 3), strict=True):
        assert_rounded_to_8bit(out, wanted)


def test_kernel_saturates(run_kernel: Callable[..., tuple[Tensor, Tensor]]) -> None:
    values = arguments((1, 7, 3, 32))
    small = torch.tensor(1e-9)
    for out, wanted in zip(
        run(run_kernel, (*values[:6], small, small), 3), quotients(values, 3), strict=True
    ):
        assert torch.equal(out.float(), wanted.sign().float() * 448)


def test_kernel_keeps_zeros_and_nan_in_their_tokens(
    run_kernel: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    q, k, *others = arguments((1, 7, 3, 32))
    clean_q, clean_k = run(run_kernel, (q, k, *others), 3)
    k[0, 1] = 0
    k[0, 2, 3] = torch.nan
    out_q, out_k = run(run_kernel, (q, k, *others), 3)
    assert (out_k[0, 1].float() == 0).all()
    assert out_k[0, 2].float().isnan().all()
    rest = [0, 3, 4, 5, 6]
    assert torch.equal(out_k.view(torch.uint8)[:, rest], clean_k.view(torch.uint8)[:, rest])
    assert torch.equal(out_q.view(torch.uint8), clean_q.view(torch.uint8))


def test_op_runs_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanx.kernels.rms_norm_rope_quantize.runs_reference", lambda *_: False)
    values = [value.to(DEVICE) for value in arguments((2, 5, 2, 32), torch.bfloat16)]
    expected = launch_rms_norm_rope(*values[:6], 2, EPS, (values[6], values[7]))
    outs = rms_norm_rope_quantize(*values, num_heads=2, eps=EPS)
    for out, wanted in zip(outs, expected, strict=True):
        assert torch.equal(out.view(torch.uint8), wanted.view(torch.uint8))
