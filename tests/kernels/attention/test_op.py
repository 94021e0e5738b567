from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.peers import relative_error
from wanx.kernels.attention.op import Attention, BiasedAttention, attention, attention_reference

# (batch, queries, keys, heads, width of a head)
SIZES = [
    (1, 1, 1, 1, 24),
    (1, 7, 7, 3, 24),
    (2, 5, 11, 2, 32),
    (1, 9, 512, 1, 128),
    (1, 67, 3, 5, 6),
]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
Size = tuple[int, int, int, int, int]


def formula(heads: int, scale: float) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = (t.unflatten(-1, (heads, -1)) for t in (q, k, v))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
        if bias is not None:
            scores = scores + bias
        weights = torch.exp(scores - scores.logsumexp(-1, keepdim=True))
        return torch.einsum("bhij,bjhd->bihd", weights, v).flatten(-2)

    return attend


def arguments(size: Size, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    batch, queries, keys, heads, width = size
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(batch, length, heads * width, generator=generator).to(dtype)
        for length in (queries, keys, keys)
    )
    return q, k, v


def bias_for(size: Size) -> Tensor:
    _, queries, keys, heads, _ = size
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, heads, queries, keys, generator=generator)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_reference(
    size: Size,
    biased: bool,
    dtype: torch.dtype,
    assert_rounded_once: Callable[[Tensor, Tensor], None],
) -> None:
    heads, scale = size[3], 0.3
    values = arguments(size, dtype)
    bias = bias_for(size).to(dtype) if biased else None
    out = attention_reference(*values, bias, heads, scale)
    assert out.dtype == dtype
    exact = formula(heads, scale)(
        *(value.double() for value in values), None if bias is None else bias.double()
    )
    assert_rounded_once(out, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_onnx_function(
    size: Size, biased: bool, dtype: torch.dtype, run_onnx: Callable[..., list[Tensor]]
) -> None:
    """ONNX Runtime's processor kernels know fp32 and fp16; the latter accumulate in fp16."""
    heads, scale = size[3], 0.3
    values = arguments(size, dtype)
    bias = bias_for(size).to(dtype) if biased else None
    function = BiasedAttention if biased else Attention
    inputs = values if bias is None else (*values, bias)
    (out,) = run_onnx(function, inputs, num_heads=heads, scale=scale)
    expected = attention_reference(*values, bias, heads, scale).float()
    assert relative_error(out, expected) <= (1e-5 if dtype == torch.float32 else 0.01)


def test_large_scores_do_not_overflow(run_onnx: Callable[..., list[Tensor]]) -> None:
    """umT5 does not scale its scores, which reach hundreds."""
    q, k, v = arguments((1, 7, 9, 2, 32))
    q = q * 100
    exact = formula(2, 1.0)(q.double(), k.double(), v.double())
    (out,) = run_onnx(Attention, (q, k, v), num_heads=2, scale=1.0)
    for result in (attention(q, k, v, num_heads=2, scale=1.0), out):
        assert relative_error(result, exact) <= 1e-4


@pytest.mark.parametrize("width", [6, 24, 32, 128])
def test_default_scale(width: int) -> None:
    size = (1, 5, 7, 2, width)
    values = arguments(size)
    exact = formula(2, 1 / width**0.5)(*(value.double() for value in values))
    assert relative_error(attention(*values, num_heads=2), exact) <= 1e-5


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_op(size: Size, biased: bool, check_op: Callable[..., None]) -> None:
    heads, scale = size[3], 0.3
    overload = torch.ops.wanx.biased_attention if biased else torch.ops.wanx.attention
    bias = (bias_for(size),) if biased else ()
    check_op(
        overload.default,
        (*arguments(size), *bias, heads, scale),
        lambda q, k, v, b=None: attention(q, k, v, bias=b, num_heads=heads, scale=scale),
        formula(heads, scale),
    )
