from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peers import relative_error
from torch import Tensor

from wanx.kernels.rms_norm_rope import RMSNormRope, rms_norm_rope, rms_norm_rope_reference

EPS = 0.05  # large enough to be seen
# (batch, length, heads, width of a head)
SIZES = [(1, 1, 1, 24), (1, 7, 3, 24), (2, 5, 2, 32), (1, 13, 1, 128), (1, 9, 5, 6)]
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
