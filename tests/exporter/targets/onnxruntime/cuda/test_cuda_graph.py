"""Graphs for CUDA, which no test can run: their types and kernels, and their numbers in fp32."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx.inliner
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx_ir.passes.common import InlinePass

from tests.support.component_feeds import component_feeds
from tests.support.peers import relative_error
from wanx.bundle.reader import Bundle, open_bundle
from wanx.errors import WanxError
from wanx.exporter.build import build
from wanx.exporter.calibration.options import CalibrationOptions
from wanx.exporter.component_writer import save_graph
from wanx.exporter.export import export
from wanx.exporter.options import ExportOptions
from wanx.exporter.quantization.scheme import QuantizeOptions
from wanx.exporter.targets.onnxruntime.cuda import graph as cuda
from wanx.exporter.targets.onnxruntime.cuda import missing_kernels
from wanx.exporter.targets.onnxruntime.cuda.kernel_table import TABLE
from wanx.exporter.targets.onnxruntime.cuda.missing_kernels import unsupported_nodes
from wanx.runtime.sessions.onnxruntime.loading import create_session, folds

QUICK = CalibrationOptions(prompts=1, steps=2, golden_steps=1, width=32, height=32, frames=5)
COMPONENTS = [
    *("text_encoder", "image_encoder", "dit"),
    *(f"vae_encoder_{part}" for part in ("down_first", "down_rest", "mid_first", "mid_rest")),
    *(f"vae_decoder_{part}" for part in ("mid_first", "mid_rest", "up_first", "up_rest")),
]
Bundles = Callable[[str], Bundle]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """The built-in model at a precision, made when it is asked for."""
    base = tmp_path_factory.mktemp("cuda")
    made: dict[str, Bundle] = {}

    def find(kind: str) -> Bundle:
        precision, _, form = kind.partition(" ")
        forms = {
            "": QuantizeOptions(),
            "dynamic": QuantizeOptions(
                activation_scale="dynamic", weight_scale="tensor", attention="fp8"
            ),
        }
        if kind not in made:
            made[kind] = export(
                ExportOptions(
                    source="tiny-i2v", output=base / kind.replace(" ", "-"), precision=precision,
                    calibration=QUICK, quantize=forms[form],
                )
            )  # fmt: skip
        return made[kind]

    return find


KINDS = ["fp32", "bf16", "fp16", "int8", "fp8", "fp8 dynamic"]
CASES = [(kind, component) for kind in KINDS[:3] for component in COMPONENTS] + [
    (kind, component) for kind in KINDS[3:] for component in ("text_encoder", "dit")
]


def write(bundle: Bundle, component: str, path: Path, dtype: torch.dtype | None = None) -> Path:
    save_graph(cuda.cuda_graph(bundle.root, bundle.manifest, component, dtype), path)
    return path


@pytest.mark.parametrize(("kind", "component"), CASES)
def test_every_node_has_a_kernel(
    kind: str, component: str, bundles: Bundles, tmp_path: Path
) -> None:
    graph = write(bundles(kind), component, tmp_path / "graph.onnx")
    assert unsupported_nodes(graph) == []
    model = onnx.load(graph, load_external_data=False)
    # Strict inference finds operands of different types, but knows no com.microsoft.
    onnx.shape_inference.infer_shapes(onnx.inliner.inline_local_functions(model))
    assert {o.type.tensor_type.elem_type for o in model.graph.output} == {onnx.TensorProto.FLOAT}


@pytest.mark.parametrize("kind", ["bf16", "fp16", "int8", "fp8"])
@pytest.mark.parametrize("component", ["text_encoder", "dit"])
def test_products_have_16_bits(kind: str, component: str, bundles: Bundles, tmp_path: Path) -> None:
    """No weight of a block passes through fp32, and nothing is an fp32 twin of what is stored."""
    graph = write(bundles(kind), component, tmp_path / "graph.onnx")
    model = InlinePass()(ir.load(graph)).model
    missing_kernels._infer_types(model.graph, model.opset_imports[""])
    wanted = ir.DataType.FLOAT16 if kind == "fp16" else ir.DataType.BFLOAT16
    found = Counter(
        node.inputs[0].dtype
        for node in model.graph
        if node.op_type in ("MatMul", "MatMulNBits") and node.inputs[0] is not None
    )
    # The first product of the time embedding, on sines and cosines.
    assert found.pop(ir.DataType.FLOAT, 0) == (0 if component == "text_encoder" else 1)
    assert found.keys() == {wanted}
    assert found[wanted] >= 10


@pytest.mark.parametrize(("kind", "component"), CASES)
def test_it_computes_the_same_in_fp32(
    kind: str, component: str, bundles: Bundles, tmp_path: Path
) -> None:
    """The same rewriting, in a type that the processor has, against the portable graph."""
    bundle = bundles(kind)
    record = bundle.manifest.components[component]
    graph = write(bundle, component, tmp_path / "graph.onnx", torch.float32)
    feeds = component_feeds(component, bundle.manifest.config)
    session = create_session(graph, bundle.root, threads=1, fold=False)
    actual = dict(
        zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True)
    )
    portable = create_session(
        bundle.root / record.engines.get("cpu", record.graph), bundle.root, threads=1,
        fold=folds(record),
    )  # fmt: skip
    names = [o.name for o in portable.get_outputs()]
    assert list(actual) == names
    # Activations are not rounded to 8 bits here; the text encoder's are to 14 there.
    bound = 0.15 if kind[:3] in ("int", "fp8") else 1e-5
    if kind[:3] in ("int", "fp8") and component == "text_encoder":
        bound = 0.01
    for name, value in zip(names, portable.run(None, feeds), strict=True):
        if value.any():
            assert relative_error(actual[name], value) <= bound
        else:
            assert not actual[name].any()


def test_weights_of_8_bits_are_read_as_they_are_stored(bundles: Bundles, tmp_path: Path) -> None:
    graph = ir.load(write(bundles("int8"), "text_encoder", tmp_path / "graph.onnx")).graph
    products = [node for node in graph if node.op_type == "MatMulNBits"]
    assert len(products) == 14  # seven a block
    for node in products:
        weight = node.inputs[1]
        assert weight is not None
        assert weight.is_initializer()
        assert weight.dtype == ir.DataType.UINT8


def test_the_target(bundles: Bundles, tmp_path: Path) -> None:
    bundle = bundles("bf16")
    built = build(bundle, "cuda")
    assert built.manifest.target == "cuda"
    for name, component in built.manifest.components.items():
        assert component.engines["cuda"].endswith(f"/{name}.onnx")
    assert open_bundle(bundle.root, verify="full").hash == built.hash
    again = build(built, "cuda")
    assert again.manifest.files == built.manifest.files
    back = build(again, "cpu")
    assert back.manifest.target == "cpu"
    forced = build(back, "cuda", force=True)
    before, after = (
        {component.engines["cuda"] for component in one.manifest.components.values()}
        for one in (built, forced)
    )
    assert not before & after
    assert build(forced, "cuda").manifest.files == forced.manifest.files
    assert all(bundle.root.joinpath(path).is_file() for path in after)


@pytest.mark.parametrize("strict", [False, True])
def test_nodes_without_a_kernel_are_said(
    strict: bool, bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """As where ONNX Runtime drops a kernel that a graph needs."""
    shutil.copytree(bundles("bf16").root, tmp_path / "bundle")
    bundle = open_bundle(tmp_path / "bundle")
    before = bundle.manifest.files
    kernels = {domain: dict(operators) for domain, operators in TABLE["cuda"].items()}
    del kernels["com.microsoft"]["MultiHeadAttention"]
    monkeypatch.setattr(missing_kernels, "TABLE", {**TABLE, "cuda": kernels})
    line = (
        r"cuda has no kernel for nodes of (\w+): \d+ × com.microsoft.MultiHeadAttention-1: no ker"
    )
    if strict:
        monkeypatch.setenv("WANX_STRICT", "1")
        with pytest.raises(WanxError, match=line):
            build(bundle, "cuda", force=True)
        assert open_bundle(bundle.root, verify="full").manifest.files == before
        return
    build(bundle, "cuda", force=True)
    said = [match for message in caplog.messages if (match := re.match(line, message))]
    local = ("vae_encoder_down", "vae_decoder_up")  # these and the text encoder have other ones
    attend = {name for name in COMPONENTS if not name.startswith(("text", *local))}
    assert {match[1] for match in said} == attend
    assert all(match.string.endswith("to the processor, if that has one") for match in said)
    caplog.clear()
    build(open_bundle(bundle.root), "cuda")  # which finds them there
    assert len([message for message in caplog.messages if re.match(line, message)]) == len(said)


@pytest.mark.gpu
@pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="onnxruntime-gpu is not installed (docs/install.md)",
)
@pytest.mark.parametrize(("kind", "component"), CASES)
def test_on_a_gpu(kind: str, component: str, bundles: Bundles, tmp_path: Path) -> None:
    """In 16 bits, as close to fp32 on the processor as 16 bits allow."""
    bundle = bundles(kind)
    feeds = component_feeds(component, bundle.manifest.config)
    graph = write(bundle, component, tmp_path / "graph.onnx")
    exact = write(bundle, component, tmp_path / "exact.onnx", torch.float32)
    expected = create_session(exact, bundle.root, fold=False).run(None, feeds)
    session = create_session(graph, bundle.root, provider="cuda")
    for actual, value in zip(session.run(None, feeds), expected, strict=True):
        if value.any():
            assert relative_error(actual, value) <= 0.05
