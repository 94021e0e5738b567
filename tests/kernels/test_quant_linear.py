from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

from tests.support.onnx_runs import Traced, run_function, traced
from tests.support.peers import relative_error
from wanx.exporter.components import GraphInput
from wanx.kernels.quant_linear import (
    QuantLinear,
    QuantLinearRows,
    quant_linear,
    quant_linear_reference,
    quant_linear_rows,
)
from wanx.kernels.quantize import quantize, quantize_rows
from wanx.kernels.registry import NODES

E4M3 = torch.float8_e4m3fn
EIGHT_BIT = [torch.int8, E4M3]
# (leading sizes, K, N)
SIZES = [((1, 1), 7, 1), ((1, 5), 130, 7), ((2, 33), 257, 130), ((4,), 64, 257)]
Size = tuple[tuple[int, ...], int, int]


def eight_bit(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Random codes over the whole range, the lowest and the highest among them."""
    generator = torch.Generator().manual_seed(seed)
    low, high = (-128, 127) if dtype == torch.int8 else (-448, 448)
    values = torch.rand(shape, generator=generator) * (high - low) + low
    values.view(-1)[:2] = torch.tensor([low, high])
    return (values.round() if dtype == torch.int8 else values).to(dtype)


def arguments(
    size: Size,
    dtype: torch.dtype,
    *,
    rows: bool = False,
    per_tensor: bool = False,
    bias_type: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:
    leading, k, n = size
    generator = torch.Generator().manual_seed(2)
    x_scale = torch.rand((*leading, 1) if rows else (), generator=generator) * 0.03 + 1e-3
    weight_scale = torch.rand(() if per_tensor else (n,), generator=generator) * 0.01 + 1e-4
    bias = torch.randn(n, generator=generator).to(bias_type)
    x8, weight8 = eight_bit((*leading, k), dtype, 0), eight_bit((n, k), dtype, 1)
    return x8, x_scale, weight8, weight_scale, bias


def formula(
    x8: Tensor, x_scale: Tensor, weight8: Tensor, weight_scale: Tensor, bias: Tensor
) -> Tensor:
    scale = weight_scale.expand(len(weight8))
    return torch.einsum("...k,nk,n->...n", x8 * x_scale, weight8, scale) + bias


@pytest.mark.parametrize("bias_type", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", EIGHT_BIT)
@pytest.mark.parametrize("size", SIZES)
def test_reference(
    size: Size,
    dtype: torch.dtype,
    rows: bool,
    per_tensor: bool,
    bias_type: torch.dtype,
    assert_rounded_once: Callable[[Tensor, Tensor], None],
) -> None:
    values = arguments(size, dtype, rows=rows, per_tensor=per_tensor, bias_type=bias_type)
    out = quant_linear_reference(*values)
    assert (out.dtype, out.shape) == (bias_type, (*size[0], size[2]))
    assert_rounded_once(out, formula(*(value.double() for value in values)))


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", EIGHT_BIT)
@pytest.mark.parametrize("size", SIZES)
def test_onnx_function(size: Size, dtype: torch.dtype, rows: bool, per_tensor: bool) -> None:
    values = arguments(size, dtype, rows=rows, per_tensor=per_tensor)
    (out,) = run_function(QuantLinearRows if rows else QuantLinear, values)
    assert relative_error(out, quant_linear_reference(*values)) <= 1e-5


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", EIGHT_BIT)
def test_onnx_function_follows_the_type_of_the_bias(dtype: torch.dtype, rows: bool) -> None:
    """Small codes, because raw products of e4m3 overflow fp16."""
    x8, *others, bias = arguments(SIZES[1], dtype, rows=rows)
    values = ((x8.float() / 16).to(dtype), *others, bias.half())
    (out,) = run_function(QuantLinearRows if rows else QuantLinear, values)
    assert relative_error(out, quant_linear_reference(*values).float()) <= 0.005


class QuantizedInput(nn.Module):
    """Three layers that share an input, like q, k and v."""

    def __init__(self, k: int, n: int, dtype: torch.dtype, *, per_tensor: bool, rows: bool) -> None:
        super().__init__()
        self.dtype, self.rows = dtype, rows
        self.x_scale = nn.Parameter(torch.ones(()))
        shape = () if per_tensor else (n,)
        for name in "abc":
            weight = torch.zeros(n, k, dtype=dtype)
            setattr(self, f"weight_{name}", nn.Parameter(weight, requires_grad=False))
            setattr(self, f"scale_{name}", nn.Parameter(torch.ones(shape)))
            setattr(self, f"bias_{name}", nn.Parameter(torch.zeros(n)))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        layers = [
            [getattr(self, f"{part}_{name}") for part in ("weight", "scale", "bias")]
            for name in "abc"
        ]
        if self.rows:
            return tuple(quant_linear_rows(*quantize_rows(x), *layer) for layer in layers)
        return tuple(
            quant_linear(quantize(x, self.x_scale, self.dtype), self.x_scale, *layer)
            for layer in layers
        )


def trace_three(
    size: Size,
    dtype: torch.dtype,
    folder: Path,
    *,
    per_tensor: bool,
    rows: bool,
    limit: int = 448,
    **config: str,
) -> tuple[Traced, Tensor, list[Tensor]]:
    """A graph, an input with rows that saturate, and what torch makes of it."""
    _, k, n = size
    values = arguments(size, dtype, per_tensor=per_tensor)
    weights = {"x_scale": values[1]}
    for seed, name in enumerate("abc"):
        codes = eight_bit((n, k), dtype, 10 + seed).float().clamp(-limit, limit)
        weights[f"weight_{name}"] = codes.to(dtype)
        weights[f"scale_{name}"], weights[f"bias_{name}"] = values[3] * (1 + seed), values[4] + seed

    def build() -> nn.Module:
        return QuantizedInput(k, n, dtype, per_tensor=per_tensor, rows=rows)

    graph = traced(
        build, weights, [GraphInput(name="x", shape=(1, "L", k))], folder, outputs=3,
        config={key.replace("_", "."): entry for key, entry in config.items()},
    )  # fmt: skip
    module = build()
    module.load_state_dict(weights)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, 37, k, generator=generator)
    x[:, :3] *= 100
    with torch.no_grad():
        return graph, x, list(module(x))


@pytest.mark.parametrize(
    ("dtype", "rows", "per_tensor"),
    [
        (torch.int8, False, False), (torch.int8, False, True),
        (E4M3, False, False), (E4M3, False, True), (E4M3, True, False),
    ],
)  # fmt: skip
def test_traced(dtype: torch.dtype, rows: bool, per_tensor: bool, tmp_path: Path) -> None:
    graph, x, expected = trace_three(SIZES[2], dtype, tmp_path, per_tensor=per_tensor, rows=rows)
    for out, wanted in zip(graph.run(x), expected, strict=True):
        assert relative_error(out, wanted) <= 1e-5
    assert sum(n.domain == "wanx" and "Linear" in n.op_type for n in graph.model.graph) == 3
    assert graph.optimised.count("QuantizeLinear") == 1
    # The weights stay 8-bit in memory: nothing dequantises them when the session is made.
    optimised = onnx.load(tmp_path / "optimised.onnx").graph
    stored = TensorProto.INT8 if dtype == torch.int8 else TensorProto.FLOAT8E4M3FN
    matrices = [tensor.data_type for tensor in optimised.initializer if len(tensor.dims) == 2]
    assert matrices == [stored] * 3


@pytest.mark.parametrize(("size", "per_tensor"), [(SIZES[1], True), (SIZES[2], False)])
def test_onnxruntime_takes_it_for_an_integer_product(
    size: Size, per_tensor: bool, tmp_path: Path
) -> None:
    """The pattern is the one that is known, and symmetric: no zero point is needed.

    Weights of 7 bits, since processors without VNNI add two products in 16 bits, which saturate.
    """
    graph, x, expected = trace_three(
        size, torch.int8, tmp_path, per_tensor=per_tensor, rows=False, limit=64,
        session_qdqisint8allowed="1",
    )  # fmt: skip
    assert graph.optimised.count("MatMulIntegerToFloat") == 3
    assert graph.optimised.count("QuantizeLinear") == 1
    assert not {"MatMul", "DequantizeLinear"} & set(graph.optimised)
    for out, wanted in zip(graph.run(x), expected, strict=True):
        assert relative_error(out, wanted) <= 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_does_not_become_finite(bad: float) -> None:
    _, _, weight8, weight_scale, bias = arguments(SIZES[1], E4M3)
    x = torch.randn(3, 130, generator=torch.Generator().manual_seed(0))
    x[1, 4] = bad
    x8, scale = quantize_rows(x)
    values = (x8, scale, weight8, weight_scale, bias)
    for out in (quant_linear_rows(*values), *run_function(QuantLinearRows, values)):
        assert out.isnan().all(-1).tolist() == [False, True, False]
        assert out[::2].isfinite().all()


@pytest.mark.parametrize("dtype", EIGHT_BIT)
@pytest.mark.parametrize("rows", [False, True])
def test_op(rows: bool, dtype: torch.dtype) -> None:
    op = torch.ops.wanx.quant_linear_rows if rows else torch.ops.wanx.quant_linear
    public = quant_linear_rows if rows else quant_linear
    values = arguments(SIZES[1], dtype, rows=rows)
    assert op.default in NODES
    # torch's check of the schema computes with the inputs, and cannot with e4m3.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op.default, values, test_utils=checks)
    out = op.default(*values)
    for index in (1, 3, 4):
        leaf = values[index].clone().requires_grad_()
        exact = values[index].double().requires_grad_()
        ours = public(*values[:index], leaf, *values[index + 1 :])
        torch.testing.assert_close(ours, out)
        ours.square().sum().backward()
        doubles = [value.double() for value in values]
        formula(*doubles[:index], exact, *doubles[index + 1 :]).square().sum().backward()
        assert leaf.grad is not None
        assert relative_error(leaf.grad, exact.grad) <= 1e-5
