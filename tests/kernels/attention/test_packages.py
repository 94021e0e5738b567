"""Attention of other packages, with modules in their place that compute what those promise."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import wanx.kernels.attention.cudnn_fp8 as cudnn_fp8_module
import wanx.kernels.attention.fa3 as fa3_module
from tests.support.interpreter import DEVICE
from wanx.kernels.launch import capture_launches

E4M3 = torch.float8_e4m3fn
HEADS, HEAD, SCALE = 3, 64, 0.125


def operands(queries: int = 70, keys: int = 90, batch: int = 2) -> list[Tensor]:
    """q, k and v; k and v are halves of longer rows. One channel of k lies far from zero."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, queries, HEADS * HEAD, generator=generator)
    kv = torch.randn(batch, keys, 2 * HEADS * HEAD, generator=generator)
    kv[..., 5] += 100
    return [q.bfloat16(), *kv.bfloat16().chunk(2, -1)]


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    split = [t.double().unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v)]
    out = F.scaled_dot_product_attention(*split, scale=SCALE)
    return out.transpose(1, 2).flatten(-2)


def cosine(found: Tensor, wanted: Tensor) -> float:
    return torch.cosine_similarity(found.double().flatten(), wanted.flatten(), 0).item()


class Runs(nn.Module):
    def __init__(self, op: Callable[..., Tensor]) -> None:
        super().__init__()
        self.op = op

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.op(q * 2, k, v, HEADS, SCALE) + 1


def check_tracing(op: Any, values: list[Tensor]) -> None:
    """What torch.export and Inductor need: the op is one node, whose fake tells the truth."""
    torch.library.opcheck(op, (*values, HEADS, SCALE))
    program = torch.export.export(Runs(op), tuple(values))
    assert [n.target for n in program.graph.nodes].count(op) == 1
    torch.testing.assert_close(program.module()(*values), Runs(op)(*values))


def on_hopper(*shape: int, dtype: torch.dtype = torch.bfloat16, row: int | None = None) -> Any:
    strides = (shape[1] * (row or shape[2]), row or shape[2], 1)
    return SimpleNamespace(
        device=torch.device("cuda:0"), is_cuda=True, dtype=dtype, shape=torch.Size(shape),
        ndim=3, stride=lambda axis: strides[axis],
    )  # fmt: skip


@pytest.fixture
def _forget() -> Iterator[None]:
    caches = (
        fa3_module._interface, cudnn_fp8_module._cudnn, cudnn_fp8_module._plan,
        cudnn_fp8_module._new_handle,
    )  # fmt: skip
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def change(sm: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: divmod(sm, 10))

    change(90)
    return change


@pytest.fixture
def fa3(monkeypatch: pytest.MonkeyPatch, _forget: None) -> list[dict[str, Any]]:
    """FlashAttention-3, by its signature; what it was called with."""
    calls: list[dict[str, Any]] = []

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False
    ) -> Tensor:
        calls.append({"strides": [t.stride() for t in (q, k, v)], "shape": q.shape, "v": v})
        assert not causal
        split = [t.transpose(1, 2) for t in (q, k, v)]
        out = F.scaled_dot_product_attention(*split, scale=softmax_scale)
        return out.transpose(1, 2).contiguous()

    module = ModuleType("fa3_fwd_interface")
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", module)
    return calls


@pytest.mark.skipif(DEVICE == "cuda", reason="the package itself is tested")
def test_fa3(fa3: list[dict[str, Any]]) -> None:
    """It is given views of packed rows, and its result has heads side by side."""
    q, k, v = operands()
    out = fa3_module.attention_fa3(q, k, v, HEADS, SCALE)
    assert (out.shape, out.dtype, out.is_contiguous()) == (q.shape, q.dtype, True)
    assert cosine(out, exact(q, k, v)) > 0.9999
    row = HEADS * HEAD
    assert fa3[0]["shape"] == (2, 70, HEADS, HEAD)
    assert fa3[0]["strides"] == [(70 * row, row, HEAD, 1)] + 2 * [(90 * 2 * row, 2 * row, HEAD, 1)]
    assert fa3[0]["v"].data_ptr() == v.data_ptr()
    check_tracing(torch.ops.wanx.attention_fa3.default, [q, k, v])


@pytest.mark.usefixtures("fa3")
def test_where_fa3_runs(capability: Callable[[int], None]) -> None:
    def reason(*shape: int, **how: Any) -> str | None:
        return fa3_module.unsupported_reason(*(on_hopper(*shape, **how),) * 3, HEADS)

    assert reason(2, 70, 192) is None
    assert reason(2, 70, 192, row=576) is None
    assert "not bfloat16" in (reason(2, 70, 192, dtype=torch.float16) or "")
    assert "heads of 12" in (reason(2, 70, 36) or "")
    assert "heads of 264" in (reason(2, 70, 792) or "")
    assert "no multiples of 8 apart" in (reason(2, 70, 192, row=580) or "")
    for sm in (89, 100):
        capability(sm)
        assert f"needs SM90, this GPU is SM{sm}" in (reason(2, 70, 192) or "")


@pytest.mark.usefixtures("_forget", "capability")
def test_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, package, extra in (
        ("fa3_fwd_interface", fa3_module, "fa3"), ("cudnn", cudnn_fp8_module, "cudnn"),
    ):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, None)
        reason = package.unsupported_reason(*(on_hopper(2, 70, 192),) * 3, HEADS) or ""
        assert f"import of {name} halted" in reason
        assert reason.endswith(f": pip install 'wanx[{extra}]'")
        cpu = torch.empty(2, 70, 192, dtype=torch.bfloat16)
        assert "not on cpu" in (package.unsupported_reason(cpu, cpu, cpu, HEADS) or "")


class Node:
    """A tensor of a graph of cuDNN."""

    def __init__(self, **facts: Any) -> None:
        self.facts = facts

    def __getattr__(self, name: str) -> Callable[[Any], Node]:
        def change(value: Any) -> Node:
            self.facts[name.removeprefix("set_")] = value
            return self

        return change


class Graph:
    """A graph of cuDNN with FP8 attention, executed as the documentation says."""

    made: ClassVar[list[Graph]] = []

    def __init__(self, **facts: Any) -> None:
        self.facts, self.built = facts, False
        Graph.made.append(self)

    def tensor(self, **facts: Any) -> Node:
        return Node(**facts)

    def sdpa_fp8(self, *, attn_scale: float, generate_stats: bool, **inputs: Node) -> list[Node]:
        assert not generate_stats
        self.inputs, self.scale = inputs, attn_scale
        self.o, self.amax_o = Node(), Node()
        return [self.o, Node(), Node(), self.amax_o]

    def build(self, heuristics: list[str]) -> None:
        self.built = heuristics == ["A", "FALLBACK"]

    def get_workspace_size(self) -> int:
        return 48

    def execute(self, operands: dict[int, Tensor], workspace: Tensor, handle: Any) -> None:
        assert self.built
        assert (workspace.shape, workspace.dtype, handle.stream) == ((48,), torch.uint8, 7)

        def view(node: Node) -> Tensor:
            """As cuDNN sees memory: by the graph's shape and strides, not by the tensor's."""
            tensor = operands[node.facts["uid"]]
            assert str(tensor.dtype).endswith(node.facts["data_type"])
            return tensor.as_strided(node.facts["dim"], node.facts["stride"])

        read = {name: view(node).float() for name, node in self.inputs.items()}
        score = (read["q"] * read["descale_q"]) @ (read["k"] * read["descale_k"]).mT * self.scale
        weight = torch.exp(score - score.amax(-1, keepdim=True))
        rounded = (weight * read["scale_s"]).clamp(max=448).to(E4M3).float() * read["descale_s"]
        out = rounded @ (read["v"] * read["descale_v"]) / weight.sum(-1, keepdim=True)
        assert (out * read["scale_o"]).abs().max() < 448
        view(self.o).copy_(out * read["scale_o"])
        view(self.amax_o).fill_(out.abs().max())


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch, _forget: None) -> type[Graph]:
    kinds = {"FP8_E4M3": "float8_e4m3fn", "FLOAT": "float32", "BFLOAT16": "bfloat16", "HALF": "16"}
    module = ModuleType("cudnn")
    vars(module).update(
        data_type=SimpleNamespace(**kinds),
        heur_mode=SimpleNamespace(A="A", FALLBACK="FALLBACK"),
        create_handle=SimpleNamespace,
        set_stream=lambda handle, stream: setattr(handle, "stream", stream),
        pygraph=Graph,
    )
    monkeypatch.setitem(sys.modules, "cudnn", module)
    stream = SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(Graph, "made", [])
    return Graph


@pytest.mark.skipif(DEVICE == "cuda", reason="the package itself is tested")
@pytest.mark.parametrize(("sm", "narrow"), [(90, True), (100, False)])
def test_cudnn_fp8(sm: int, narrow: bool, cudnn: type[Graph]) -> None:
    q, k, v = operands(200, 600)
    with capture_launches(lambda *_: pytest.fail("a kernel was launched"), sm):
        for _ in range(2):
            out = cudnn_fp8_module.attention_cudnn_fp8(q, k, v, HEADS, SCALE)
    assert (out.shape, out.dtype, out.is_contiguous()) == (q.shape, q.dtype, True)
    assert cosine(out, exact(q, k, v)) > 0.998
    (graph,) = cudnn.made
    assert graph.o.facts["data_type"] == ("float8_e4m3fn" if narrow else "bfloat16")
    assert graph.facts["io_data_type"] == "float8_e4m3fn"
    row = HEADS * HEAD
    assert graph.inputs["k"].facts["dim"] == (2, HEADS, 600, HEAD)
    assert graph.inputs["k"].facts["stride"] == (600 * row, HEAD, row, 1)
    assert len({node.facts["uid"] for node in (*graph.inputs.values(), graph.o)}) == 10


@pytest.mark.skipif(DEVICE == "cuda", reason="the package itself is tested")
@pytest.mark.usefixtures("cudnn")
def test_tracing_cudnn_fp8() -> None:
    check_tracing(torch.ops.wanx.attention_cudnn_fp8.default, operands(20, 30))


@pytest.mark.skipif(DEVICE == "cuda", reason="the package itself is tested")
@pytest.mark.usefixtures("cudnn")
def test_cudnn_fp8_of_zeros() -> None:
    q, k, v = (torch.zeros_like(t) for t in operands(4, 5))
    out = cudnn_fp8_module.attention_cudnn_fp8(q, k, v, HEADS, SCALE)
    assert torch.equal(out, torch.zeros_like(q))


@pytest.mark.usefixtures("cudnn")
def test_where_cudnn_fp8_runs(capability: Callable[[int], None]) -> None:
    def reason(*shape: int, dtype: torch.dtype = torch.float16) -> str | None:
        values = (on_hopper(*shape, dtype=dtype),) * 3
        return cudnn_fp8_module.unsupported_reason(*values, HEADS)

    assert reason(2, 70, 192) is None
    assert "float32" in (reason(2, 70, 192, dtype=torch.float32) or "")
    assert "heads of 24" in (reason(2, 70, 72) or "")
    assert "heads of 144" in (reason(2, 70, 432) or "")
    for sm, wanted in ((89, "SM89"), (120, "SM120"), (80, "SM80"), (100, None)):
        capability(sm)
        assert (wanted or "") in (reason(2, 70, 192) or "")
        assert (reason(2, 70, 192) is None) == (wanted is None)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
@pytest.mark.parametrize(
    ("package", "run", "least"),
    [
        (fa3_module, fa3_module.attention_fa3, 0.9999),
        (cudnn_fp8_module, cudnn_fp8_module.attention_cudnn_fp8, 0.997),
    ],
    ids=["fa3", "cudnn-fp8"],
)
@pytest.mark.parametrize(("queries", "keys"), [(70, 90), (376, 1000), (2048, 512)])
def test_the_package_itself(
    package: Any, run: Callable[..., Tensor], least: float, queries: int, keys: int
) -> None:
    q, k, v = operands(queries, keys)
    packed = torch.cat([k, v], -1).to(DEVICE)
    values = [q.to(DEVICE), *packed.chunk(2, -1)]
    if reason := package.unsupported_reason(*values, HEADS):
        pytest.skip(reason)
    out = run(*values, HEADS, SCALE)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert cosine(out.cpu(), exact(q, k, v)) > least
    compiled = torch.compile(Runs(run), fullgraph=True)
    torch.testing.assert_close(compiled(*values), Runs(run)(*values))
