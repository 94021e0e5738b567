from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.interpreter import DEVICE
from tests.support.peers import relative_error
from wanx.kernels.rms_norm_rope import (
    RMSNormRope,
    launch_rms_norm_rope,
    rms_norm_rope,
    rms_norm_rope_reference,
)

EPS = 0.05  # large enough to be seen
# (batch, length, heads, width of a head)
SIZES = [(1, 1, 1, 24), (1, 7, 3, 24), (2, 5, 2, 32), (1, 13, 1, 128), (1, 9, 5, 6)]
# Heads of which the kernel makes blocks: their width is a power of two, their number any.
KERNEL_SIZES = [(1, 1, 1, 16), (1, 7, 3, 32), (2, 5, 2, 64), (1, 3, 12, 128), (2, 4, 5, 16)]
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def formula(heads: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """Each pair of features is a complex number that is turned by its angle."""

    def turned(x: Tensor, weight: Tensor, turn: Tensor) -> Tensor:
        normed = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
        pairs = torch.view_as_complex(normed.unflatten(-1, (heads, -1, 2)))
        return torch.view_as_real(pairs * turn[:, None, :]).flatten(-3)

    def both(
        q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        turn = torch.complex(cos, sin)
        return turned(q, q_weight, turn), turned(k, k_weight, turn)

    return both


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
    return q, k, *weights, angles.cos(), angles.sin()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", SIZES)
def test_reference_and_onnx_function(
    size: tuple[int, int, int, int],
    dtype: torch.dtype,
    run_onnx: Callable[..., list[Tensor]],
    assert_rounded_once: Callable[[Tensor, Tensor], None],
) -> None:
    heads = size[2]
    values = arguments(size, dtype)
    exact = formula(heads)(*(value.double() for value in values))
    reference = rms_norm_rope_reference(*values, heads, EPS)
    outs = run_onnx(RMSNormRope, values, outputs=2, num_heads=heads, eps=EPS)
    for wanted, ours, onnx in zip(exact, reference, outs, strict=True):
        assert ours.dtype == dtype
        assert_rounded_once(ours, wanted)
        assert_rounded_once(onnx.to(dtype), wanted)
        if dtype == torch.float32:
            assert relative_error(onnx, ours) <= 1e-5


def test_the_norm_spans_all_heads() -> None:
    """Not each head by itself: a loud head must quieten the others."""
    q, k, q_weight, k_weight, cos, sin = arguments((1, 3, 4, 8))
    loud = q.clone()
    loud[..., :8] *= 100
    quiet, _ = rms_norm_rope(q, k, q_weight, k_weight, cos, sin, num_heads=4, eps=EPS)
    out, _ = rms_norm_rope(loud, k, q_weight, k_weight, cos, sin, num_heads=4, eps=EPS)
    assert (out[..., 8:].abs() < quiet[..., 8:].abs() / 10).all()


@pytest.mark.parametrize("size", SIZES)
def test_op(size: tuple[int, int, int, int], check_op: Callable[..., None]) -> None:
    heads = size[2]
    check_op(
        torch.ops.wanx.rms_norm_rope.default,
        (*arguments(size), heads, EPS),
        lambda *tensors: rms_norm_rope(*tensors, num_heads=heads, eps=EPS),
        formula(heads),
    )


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", KERNEL_SIZES)
def test_kernel(
    size: tuple[int, int, int, int],
    dtype: torch.dtype,
    run_kernel: Callable[..., tuple[Tensor, Tensor]],
    assert_rounded_once: Callable[[Tensor, Tensor], None],
) -> None:
    heads = size[2]
    values = arguments(size, dtype)
    exact = formula(heads)(*(value.double() for value in values))
    outs = run_kernel(launch_rms_norm_rope, *values, heads, EPS)
    for wanted, out in zip(exact, outs, strict=True):
        assert out.dtype == dtype
        assert_rounded_once(out, wanted)


@pytest.mark.parametrize("dtype", TYPES)
def test_kernel_takes_rows_that_lie_apart(
    dtype: torch.dtype, run_kernel: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    """The rows of a packed q‖k‖v, and of one whose k has a row of its own distance."""
    q, k, *others = arguments((2, 5, 3, 32), dtype)
    expected = run_kernel(launch_rms_norm_rope, q, k, *others, 3, EPS)
    packed_q, packed_k, _ = (
        torch.cat([q, k, torch.full_like(q, torch.nan)], -1).to(DEVICE).split(96, -1)
    )
    by_length = k.transpose(0, 1).contiguous().to(DEVICE).transpose(0, 1)
    for keys in (packed_k, by_length):
        outs = run_kernel(launch_rms_norm_rope, packed_q, keys, *others, 3, EPS)
        for out, wanted in zip(outs, expected, strict=True):
            assert out.is_contiguous()
            assert torch.equal(out, wanted)


def test_kernel_keeps_zeros_and_nan_in_their_tokens(
    run_kernel: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    q, k, *others = arguments((1, 7, 3, 32))
    clean_q, clean_k = run_kernel(launch_rms_norm_rope, q, k, *others, 3, EPS)
    q[0, 1] = 0
    q[0, 2, 3] = torch.nan
    out_q, out_k = run_kernel(launch_rms_norm_rope, q, k, *others, 3, EPS)
    assert (out_q[0, 1] == 0).all()
    assert out_q[0, 2].isnan().all()
    rest = [0, 3, 4, 5, 6]
    assert torch.equal(out_q[:, rest], clean_q[:, rest])
    assert torch.equal(out_k, clean_k)


def test_op_runs_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanx.kernels.rms_norm_rope.runs_reference", lambda *_: False)
    values = [value.to(DEVICE) for value in arguments((2, 5, 2, 32), torch.bfloat16)]
    expected = launch_rms_norm_rope(*values, 2, EPS)
    for out, wanted in zip(rms_norm_rope(*values, num_heads=2, eps=EPS), expected, strict=True):
        assert torch.equal(out, wanted)
