from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from tests.support.onnx_runs import traced
from tests.support.peers import relative_error
from wanx.config.models import PRESETS
from wanx.exporter.components import ComponentSpec, GraphInput
from wanx.exporter.graph.trace import trace
from wanx.models.dit.model import WanDiT
from wanx.models.quantized import (
    DynamicQuantLinear,
    QuantAttentionOp,
    QuantEmbedding,
    QuantLinear,
    WeightOnlyLinear,
    quantize_weight,
    replace_linears,
)

E4M3 = torch.float8_e4m3fn
EIGHT_BIT = [torch.int8, E4M3]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
LARGEST = {torch.int8: 127, E4M3: 448}
# Signal over quantisation noise of a layer on Gaussian numbers, in dB.
SQNR = {torch.int8: 38.0, E4M3: 26.0}
NAN, INF = float("nan"), float("inf")


def random_linear(k: int = 130, n: int = 33, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(k, n, bias=bias).requires_grad_(False)


def samples(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def fill(layer: nn.Module, linear: nn.Linear, *, per_tensor: bool = False) -> None:
    """Give an 8-bit layer the numbers of a linear one."""
    weight, scale = quantize_weight(linear.weight, layer.weight.dtype, per_tensor=per_tensor)
    state = {"weight": weight, "weight_scale": scale}
    if linear.bias is not None:
        state["bias"] = linear.bias
    missing, unexpected = layer.load_state_dict(state, strict=False)
    assert (set(missing) - {"input_scale"}, unexpected) == (set(), [])


def sqnr_db(actual: Tensor, expected: Tensor) -> float:
    noise = (actual.double() - expected.double()).square().mean()
    return float(10 * (expected.double().square().mean() / noise).log10())


@pytest.mark.parametrize("w_type", TYPES)
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("dtype", EIGHT_BIT)
@pytest.mark.parametrize("shape", [(1, 1), (7, 130), (130, 257)])
def test_quantize_weight(
    shape: tuple[int, int], dtype: torch.dtype, per_tensor: bool, w_type: torch.dtype
) -> None:
    w = (samples(*shape) * torch.logspace(-3, 2, shape[0])[:, None]).to(w_type)
    weight, scale = quantize_weight(w, dtype, per_tensor=per_tensor)
    assert (weight.dtype, weight.shape) == (dtype, shape)
    assert (scale.dtype, scale.shape) == (torch.float32, () if per_tensor else shape[:1])
    exact = w.double()
    amax = exact.abs().amax() if per_tensor else exact.abs().amax(1)
    torch.testing.assert_close(scale.double(), amax / LARGEST[dtype], rtol=1e-6, atol=0)
    largest = weight.double().abs()
    assert (largest.amax() if per_tensor else largest.amax(1)).eq(LARGEST[dtype]).all()
    step = scale.double().reshape(-1, 1)
    error = (weight.double() * step - exact).abs()
    if dtype == torch.int8:
        assert (error <= step * 0.50001).all()
    else:  # half a step: 2⁻⁴ of a normal number, 2⁻¹⁰ among the smallest
        assert (error <= exact.abs() * 2.0**-3.999 + step * 2.0**-10).all()


@pytest.mark.parametrize("dtype", EIGHT_BIT)
def test_rows_that_cannot_be_divided_get_scale_one(dtype: torch.dtype) -> None:
    w = torch.stack([torch.zeros(9), torch.full((9,), 1e-44), samples(9), -samples(9) * 3e37])
    weight, scale = quantize_weight(w, dtype)
    assert scale[:2].tolist() == [1, 1]
    assert (weight[:2].float() == 0).all()
    back = weight.double() * scale.double()[:, None]
    assert sqnr_db(back[2], w[2]) >= 25
    assert sqnr_db(back[3], w[3]) >= 25
    weight, scale = quantize_weight(torch.zeros(3, 4), dtype, per_tensor=True)
    assert (scale.item(), weight.float().abs().sum().item()) == (1, 0)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("dtype", EIGHT_BIT)
def test_a_weight_that_is_not_finite(dtype: torch.dtype, per_tensor: bool, bad: float) -> None:
    w = samples(3, 5)
    w[1, 2] = bad
    with pytest.raises(ValueError, match="finite"):
        quantize_weight(w, dtype, per_tensor=per_tensor)


@pytest.mark.parametrize("x_type", TYPES)
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("dtype", EIGHT_BIT)
def test_quant_linear(dtype: torch.dtype, per_tensor: bool, x_type: torch.dtype) -> None:
    linear, x = random_linear(), samples(2, 7, 130).to(x_type)
    layer = QuantLinear(130, 33, dtype=dtype, per_tensor=per_tensor)
    fill(layer, linear, per_tensor=per_tensor)
    layer.input_scale.fill_(x.float().abs().max() / LARGEST[dtype])
    y = layer(x)
    assert y.dtype == x_type
    assert sqnr_db(y, linear(x.float())) >= SQNR[dtype]


@pytest.mark.parametrize("x_type", TYPES)
@pytest.mark.parametrize("per_tensor", [False, True])
def test_dynamic_quant_linear(per_tensor: bool, x_type: torch.dtype) -> None:
    """One scale for all rows would lose the faint ones."""
    linear = random_linear()
    x = (samples(2, 7, 130) * torch.logspace(-4, 2, 7)[:, None]).to(x_type)
    layer = DynamicQuantLinear(130, 33, per_tensor=per_tensor)
    fill(layer, linear, per_tensor=per_tensor)
    y = layer(x)
    assert y.dtype == x_type
    expected = F.linear(x.float(), linear.weight)
    if x_type == torch.float32:
        for row in range(7):
            assert sqnr_db(y[:, row] - linear.bias, expected[:, row]) >= SQNR[E4M3]
    assert sqnr_db(y, expected + linear.bias) >= SQNR[E4M3]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("x_type", TYPES)
def test_weight_only_linear(x_type: torch.dtype, bias: bool) -> None:
    linear, x = random_linear(bias=bias), samples(2, 7, 130).to(x_type)
    layer = WeightOnlyLinear(130, 33, bias=bias)
    fill(layer, linear)
    assert ("bias" in dict(layer.named_parameters())) == bias
    y = layer(x)
    assert y.dtype == x_type
    assert sqnr_db(y, linear(x.float())) >= SQNR[torch.int8]


def test_quant_embedding(tmp_path: Path) -> None:
    table = samples(61, 24) * torch.logspace(-2, 1, 61)[:, None]
    weight, scale = quantize_weight(table, torch.uint8)
    state = {"weight": weight, "weight_scale": scale}
    layer = QuantEmbedding(61, 24)
    layer.load_state_dict(state)
    ids = torch.tensor([[0, 60, 7, 7, 33]])
    expected = ((weight.double() - 128) * scale.double()[:, None])[ids]
    out = layer(ids)
    assert (out.dtype, out.shape) == (torch.float32, (1, 5, 24))
    assert relative_error(out, expected) <= 1e-6

    inputs = [GraphInput(name="ids", shape=(1, "L"), dtype=torch.int64)]
    graph = traced(lambda: QuantEmbedding(61, 24), state, inputs, tmp_path)
    assert relative_error(graph.run(ids)[0], expected) <= 1e-6
    # The table is read by one Gather, as it is stored, and nowhere is there another.
    optimised = onnx.load(tmp_path / "optimised.onnx").graph
    (stored,) = (tensor for tensor in optimised.initializer if tensor.dims[-1:] == [24])
    readers = [node.op_type for node in optimised.node if stored.name in node.input]
    assert (stored.data_type, readers) == (TensorProto.UINT8, ["Gather"])


def test_quant_attend() -> None:
    q, k, v = samples(2, 7, 48), samples(2, 11, 48), samples(2, 11, 48).flip(1)
    layer = QuantAttentionOp(3)
    for parameter, value in zip(layer.parameters(), (q, k, v), strict=True):
        parameter.fill_(value.abs().max() / 448)
    heads = [t.unflatten(-1, (3, -1)).transpose(1, 2) for t in (q, k, v)]
    expected = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(-2)
    assert sqnr_db(layer(q, k, v), expected) >= 25


LAYERS = {
    "static": lambda: QuantLinear(12, 5, dtype=torch.int8),
    "tensor": lambda: QuantLinear(12, 5, dtype=E4M3, per_tensor=True),
    "dynamic": lambda: DynamicQuantLinear(12, 5),
    "weight": lambda: WeightOnlyLinear(12, 5, bias=False),
    "embedding": lambda: QuantEmbedding(12, 5),
}
PARAMETERS = {
    "static": {"weight": (5, 12), "weight_scale": (5,), "input_scale": (), "bias": (5,)},
    "tensor": {"weight": (5, 12), "weight_scale": (), "input_scale": (), "bias": (5,)},
    "dynamic": {"weight": (5, 12), "weight_scale": (5,), "bias": (5,)},
    "weight": {"weight": (5, 12), "weight_scale": (5,)},
    "embedding": {"weight": (12, 5), "weight_scale": (12,)},
}


@pytest.mark.parametrize("kind", LAYERS)
def test_names_and_shapes(kind: str) -> None:
    """As the bundle names them, on no device as well, and without gradients."""
    modes = [torch.device("cpu"), torch.device("meta"), FakeTensorMode()]
    for mode in modes:
        with mode:
            layer = LAYERS[kind]()
        parameters = dict(layer.named_parameters())
        assert {name: tuple(p.shape) for name, p in parameters.items()} == PARAMETERS[kind]
        for name, parameter in parameters.items():
            eight_bit = parameter.dtype in (*EIGHT_BIT, torch.uint8)
            assert not parameter.requires_grad
            assert eight_bit == (name == "weight")
            assert eight_bit or parameter.dtype == torch.float32


class Projections(nn.Module):
    """Three layers with one input, in the place that q, k and v have in a block."""

    def __init__(self, dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.q = QuantLinear(dim, dim, dtype=dtype)
        self.k = QuantLinear(dim, dim, dtype=dtype, same_input=self.q)
        self.v = QuantLinear(dim, dim, dtype=dtype, same_input=self.k)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.q(x) + 2 * self.k(x) + 4 * self.v(x)
        return out


class Stack(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Projections(24, torch.int8) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("dtype", EIGHT_BIT)
def test_layers_of_one_input_share_its_scale(dtype: torch.dtype, tmp_path: Path) -> None:
    """One parameter, under the name of the first layer, and one node that quantises."""
    module = Projections(130, dtype)
    for seed, layer in enumerate((module.q, module.k, module.v)):
        torch.manual_seed(seed)
        fill(layer, nn.Linear(130, 130).requires_grad_(False))
    x = samples(1, 19, 130)
    module.q.input_scale.fill_(x.abs().max() / LARGEST[dtype])
    names = [name for name in module.state_dict() if name.endswith("input_scale")]
    assert names == ["q.input_scale"]
    expected = sum(
        factor * F.linear(x, layer.weight.float() * layer.weight_scale[:, None], layer.bias)
        for factor, layer in ((1, module.q), (2, module.k), (4, module.v))
    )
    assert sqnr_db(module(x), expected) >= SQNR[dtype]

    graph = traced(
        lambda: Projections(130, dtype), module.state_dict(),
        [GraphInput(name="x", shape=(1, "L", 130))], tmp_path,
    )  # fmt: skip
    assert set(graph.model.graph.initializers) == set(module.state_dict())
    assert graph.optimised.count("QuantizeLinear") == 1
    assert relative_error(graph.run(x)[0], module(x)) <= 1e-5


def test_every_copy_of_a_block_has_its_own_scale() -> None:
    """Of four blocks two are traced; the names of all are those of the module."""
    spec = ComponentSpec(
        name="stack", weights="stack", build=Stack, blocks=4, outputs=("y",), axes={"L": 6},
        inputs=(GraphInput(name="x", shape=(1, "L", 24)),),
    )  # fmt: skip
    graph = trace(spec).graph
    assert set(graph.initializers) == {name for name, _ in Stack(4).named_parameters()}
    assert all(value.const_value is None for value in graph.initializers.values())
    scales = [node.inputs[1].name for node in graph if node.op_type == "QuantizeLinear"]
    assert scales == [f"blocks.{block}.q.input_scale" for block in range(4)]


def test_replace_linears() -> None:
    with torch.device("meta"):
        model = WanDiT(PRESETS["tiny"].dit)
    before = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    seen = []

    def make(name: str, linear: nn.Linear) -> nn.Module | None:
        assert before[name] is linear
        seen.append(name)
        if not name.startswith("blocks.") or name.endswith("cross_attn.k"):
            return None
        with torch.device("meta"):
            return QuantLinear(linear.in_features, linear.out_features, dtype=torch.int8)

    replace_linears(model, make)
    assert seen == list(before)
    for name in before:
        module = model.get_submodule(name)
        kept = not name.startswith("blocks.") or name.endswith("cross_attn.k")
        assert (module is before[name]) if kept else isinstance(module, QuantLinear)


def test_replace_linears_below_a_prefix() -> None:
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Sequential(nn.GELU(), nn.Linear(2, 2))})
    names = []
    replace_linears(module, lambda name, _: names.append(name), "blocks.3.")
    assert names == ["blocks.3.a", "blocks.3.b.1"]
