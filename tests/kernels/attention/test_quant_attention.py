from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support.onnx_runs import run_function
from tests.support.peers import relative_error
from wanx.kernels.attention.quant_attention import (
    QuantAttention,
    quant_attention,
    quant_attention_reference,
)
from wanx.kernels.registry import NODES

E4M3 = torch.float8_e4m3fn
# (batch, queries, keys, heads, width of a head)
SIZES = [
    (1, 1, 1, 1, 24),
    (1, 7, 7, 3, 24),
    (2, 5, 11, 2, 32),
    (1, 9, 512, 1, 128),
    (1, 67, 3, 5, 6),
]
SCALE = 0.3
Size = tuple[int, int, int, int, int]
# A quotient that two ways of summing put on either side of a tie moves one weight by a step of
# e4m3; without rounding the result would be off by a hundredth.
FLIPS = 5e-4


def rounded(x: Tensor, scale: Tensor | float) -> Tensor:
    """Quantise to the nearest finite code and back, in float64, by torch's own cast."""
    return (x / scale).clamp(-448, 448).float().to(E4M3).double() * scale


def formula(heads: int, scale: float) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, *scales: Tensor) -> Tensor:
        q, k, v = (
            rounded(t, s).unflatten(-1, (heads, -1)) for t, s in zip((q, k, v), scales, strict=True)
        )
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
        weights = torch.exp(scores - scores.logsumexp(-1, keepdim=True))
        return torch.einsum("bhij,bjhd->bihd", rounded(weights, 1 / 448), v).flatten(-2)

    return attend


def arguments(size: Size, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Queries, keys and values, and scales that let the largest of them saturate."""
    batch, queries, keys, heads, width = size
    generator = torch.Generator().manual_seed(0)
    values = [
        torch.randn(batch, length, heads * width, generator=generator).to(dtype)
        for length in (queries, keys, keys)
    ]
    scales = [0.95 * value.float().abs().max() / 448 for value in values]
    return *values, *scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_reference(size: Size, dtype: torch.dtype) -> None:
    values = arguments(size, dtype)
    out = quant_attention_reference(*values, size[3], SCALE)
    assert (out.dtype, out.shape) == (dtype, values[0].shape)
    exact = formula(size[3], SCALE)(*(value.double() for value in values))
    roundoff = {torch.float32: 0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    assert relative_error(out.double(), exact) <= FLIPS + roundoff


@pytest.mark.parametrize("size", SIZES)
def test_onnx_function(size: Size) -> None:
    values = arguments(size)
    (out,) = run_function(QuantAttention, values, num_heads=size[3], scale=SCALE)
    assert relative_error(out, quant_attention_reference(*values, size[3], SCALE)) <= FLIPS


def test_onnx_function_in_half_precision() -> None:
    values = arguments(SIZES[1], torch.float16)
    (out,) = run_function(QuantAttention, values, num_heads=3, scale=SCALE)
    expected = quant_attention_reference(*values, 3, SCALE).float()
    assert relative_error(out, expected) <= 0.02


@pytest.mark.parametrize("size", SIZES[1:])
def test_is_near_to_attention(size: Size) -> None:
    """Near enough to be it, and too far to be unquantised."""
    values = arguments(size)
    heads = [t.unflatten(-1, (size[3], -1)).transpose(1, 2) for t in values[:3]]
    whole = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(-2)
    assert 0.005 <= relative_error(quant_attention(*values, num_heads=size[3]), whole) <= 0.1


def test_every_operand_is_quantised_right_before_its_product() -> None:
    """With one pair less, or another node in between, TensorRT leaves the attention unfused."""
    nodes = {
        output: node for node in QuantAttention.to_function_proto().node for output in node.output
    }
    products = [node for node in nodes.values() if node.op_type == "MatMul"]
    assert len(products) == 2
    for product in products:
        for operand in product.input:
            dequantize = nodes[operand]
            assert dequantize.op_type == "DequantizeLinear"
            assert nodes[dequantize.input[0]].op_type == "QuantizeLinear"


def test_large_scores_do_not_overflow() -> None:
    q, *others = arguments((1, 7, 9, 2, 32))
    q, q_scale = q * 1000, others[2] * 1000
    values = (q, *others[:2], q_scale, *others[3:])
    exact = formula(2, 1.0)(*(value.double() for value in values))
    (onnx,) = run_function(QuantAttention, values, num_heads=2, scale=1.0)
    for out in (quant_attention(*values, num_heads=2, scale=1.0), onnx):
        assert relative_error(out, exact) <= FLIPS


def test_a_nan_is_not_lost() -> None:
    q, k, v, *scales = arguments((1, 5, 7, 2, 8))
    v[0, 3, 1] = float("nan")
    values = (q, k, v, *scales)
    (onnx,) = run_function(QuantAttention, values, num_heads=2, scale=SCALE)
    for out in (quant_attention(*values, num_heads=2, scale=SCALE), onnx):
        assert out[0, :, 1].isnan().all()


@pytest.mark.parametrize("size", SIZES)
def test_op(size: Size) -> None:
    overload = torch.ops.wanx.quant_attention.default
    assert overload in NODES
    torch.library.opcheck(overload, (*arguments(size), size[3], SCALE))
