"""Nodes without a CUDA kernel in ONNX Runtime: those of our graphs today, and planted ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx_ir.passes.common import InlinePass

import wanx
from wanx.builtin import BUILTIN, builtin_bundle, open_named
from wanx.bundle.reader import Bundle
from wanx.exporter.calibration.options import CalibrationOptions
from wanx.exporter.components import ComponentSpec, GraphInput, component_specs
from wanx.exporter.graph.attach import attach_weights
from wanx.exporter.graph.stored_graph import graph_to_bytes
from wanx.exporter.graph.trace import trace
from wanx.exporter.quantization.quantized_spec import quantized_like_bundle
from wanx.exporter.targets.onnxruntime import narrow_weights
from wanx.exporter.targets.onnxruntime.cuda import kernel_table, missing_kernels
from wanx.exporter.targets.onnxruntime.cuda.kernel_table import MissingKernel
from wanx.exporter.targets.onnxruntime.cuda.missing_kernels import unsupported_nodes
from wanx.exporter.targets.onnxruntime.graph import optimize_for_ort
from wanx.files.safetensors import TensorRef

GRAPHS = [path for name in BUILTIN for path in sorted(builtin_bundle(name).rglob("*.onnx"))]
NARROW = (torch.bfloat16, torch.float16)


def write_graph(folder: Path, body: str, opset: int = 23) -> Path:
    """Write a graph that is given in ONNX's text form, without its name."""
    imports = f'["" : {opset}, "com.microsoft" : 1]'
    model = onnx.parser.parse_model(f"<ir_version: 10, opset_import: {imports}> g {body}")
    path = folder / "graph.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def counts(path: Path) -> dict[tuple[str, str], int]:
    """How many nodes lack a kernel, by operator and by the type that is to blame."""
    return {(node.op_type, node.found): node.count for node in unsupported_nodes(path)}


@contextmanager
def computing_in(dtype: torch.dtype) -> Iterator[None]:
    """Linears, attention and convolutions of modules made here run in ``dtype``, the rest as is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def trace_in(dtype: torch.dtype, spec: ComponentSpec, folder: Path) -> Path:
    """Write the portable graph of a component that computes in ``dtype``, without its weights."""
    caches = tuple(replace(cache, dtype=dtype) for cache in spec.caches)
    inputs = spec.inputs
    if spec.name == "image_encoder":  # the only one that does not convert what it is given
        inputs = tuple(replace(item, dtype=dtype) for item in inputs)
    with computing_in(dtype):
        model = trace(replace(spec, inputs=inputs, caches=caches))
    path = folder / f"{spec.name}.onnx"
    path.write_bytes(graph_to_bytes(model))
    return path


def small_spec(name: str) -> ComponentSpec:
    """A component of the built-in image-to-video model, the VAE with fewer layers."""
    config = open_named("tiny-i2v", verify="size").manifest.config
    vae = replace(config.vae, num_res_blocks=1, multipliers=(1, 2), temporal_downsample=(True,))
    (spec,) = (s for s in component_specs(replace(config, vae=vae)) if s.name == name)
    return spec


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    quick = CalibrationOptions(prompts=1, steps=2, golden_steps=0, width=32, height=32, frames=5)
    output = tmp_path_factory.mktemp("int8") / "bundle"
    return wanx.export("tiny", output, precision="int8", calibration=quick)


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: "/".join(path.parts[-4:]))
def test_the_built_in_graphs_lack_nothing(path: Path) -> None:
    assert unsupported_nodes(path) == []


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("name", ["text_encoder", "image_encoder", "dit"])
def test_transformers_lack_nothing_in_16_bits(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    path = trace_in(dtype, small_spec(name), tmp_path)
    assert unsupported_nodes(path) == []
    model = InlinePass()(ir.load(path)).model
    missing_kernels._infer_types(model.graph, model.opset_imports[""])
    types = {n.inputs[0].dtype.name for n in model.graph if n.op_type == "Attention"}
    assert types == {str(dtype).removeprefix("torch.").upper()}


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("vae_encoder_down_first", {"Pad": "T"}),
        ("vae_encoder_down_rest", {"Pad": "T"}),
        ("vae_decoder_up_first", {"Pad": "T", "Resize": "T1"}),
        ("vae_decoder_up_rest", {"Resize": "T1"}),
    ],
)
def test_what_the_vae_lacks_in_bfloat16(name: str, missing: dict[str, str], tmp_path: Path) -> None:
    found = unsupported_nodes(trace_in(torch.bfloat16, small_spec(name), tmp_path))
    assert {node.op_type: node.constraint for node in found} == missing
    assert {node.found for node in found} == {"bfloat16"}


def test_the_vae_lacks_nothing_in_float16(tmp_path: Path) -> None:
    for part in ("mid_first", "up_first"):
        spec = small_spec(f"vae_decoder_{part}")
        assert unsupported_nodes(trace_in(torch.float16, spec, tmp_path)) == []


def test_what_int8_lacks(int8: Bundle) -> None:
    components = int8.manifest.components
    for component in components.values():
        assert unsupported_nodes(int8.root / component.graph) == []
    layers = {n: len(c.quantization.layers) for n, c in components.items() if c.quantization}
    table = 1  # of the text encoder's embedding, which is no product
    engines = {name: c.engines["cpu"] for name, c in components.items() if c.engines}
    assert {name: counts(int8.root / path) for name, path in engines.items()} == {
        "dit": {("MatMulIntegerToFloat", ""): layers["dit"]},
        "text_encoder": {("MatMulInteger", "uint8"): layers["text_encoder"] - table},
        "vae_decoder_mid_first": {},
        "vae_decoder_mid_rest": {},
    }


def test_what_int8_lacks_in_bfloat16(int8: Bundle, tmp_path: Path) -> None:
    (spec,) = (s for s in component_specs(int8.manifest.config) if s.name == "dit")
    quantization = int8.manifest.components["dit"].quantization
    assert quantization is not None
    spec = quantized_like_bundle(spec, int8.root, int8.manifest)
    operands = 2 * len(quantization.layers)
    path = trace_in(torch.bfloat16, spec, tmp_path)
    assert counts(path) == {("DequantizeLinear", "bfloat16"): operands}


def test_types_are_those_that_onnx_infers() -> None:
    model = InlinePass()(ir.load(builtin_bundle("tiny-i2v") / "graphs" / "dit.onnx")).model
    graph = onnx.shape_inference.infer_shapes(ir.to_proto(model)).graph
    values = (*graph.value_info, *graph.output)
    expected = {value.name: value.type.tensor_type.elem_type for value in values}
    missing_kernels._infer_types(model.graph, model.opset_imports[""])
    outputs = [value for node in model.graph for value in node.outputs]
    assert {value.name: value.dtype for value in outputs} == {
        value.name: expected[value.name] for value in outputs
    }


def signatures(domain: str, op_type: str) -> Iterator[kernel_table.Signature]:
    """Signatures of an operator, by opset."""
    for opset in range(18, onnx.defs.onnx_opset_version() + 1):
        with suppress(onnx.defs.SchemaError):  # of an operator that is from a later opset
            yield kernel_table.signature_of(domain, op_type, opset)


def test_every_row_of_the_table_belongs_to_an_operator() -> None:
    for side in ("cuda", "cpu"):
        for domain, operators in kernel_table.TABLE[side].items():
            for op_type, rows in operators.items():
                for versions, constraints in rows.items():
                    names = {
                        name
                        for signature in signatures(domain, op_type)
                        if kernel_table.covers(versions, signature.since_version)
                        for formal in (*signature.inputs, *signature.outputs)
                        for name in formal
                    }
                    assert constraints.keys() <= names, (side, op_type, versions)


def test_an_operator_without_a_kernel(tmp_path: Path) -> None:
    path = write_graph(
        tmp_path,
        """(uint8[m, k] x, int8[k, n] w, float x_scale, float[n] w_scale) => (double[m, n] y) {
            product = com.microsoft.MatMulIntegerToFloat(x, w, x_scale, w_scale)
            again = com.microsoft.MatMulIntegerToFloat(x, w, x_scale, w_scale)
            sum = Add(product, again)
            y = Cast <to = 11> (sum)
        }""",
    )
    kind = MissingKernel(
        op_type="MatMulIntegerToFloat", domain="com.microsoft", since_version=1, count=2
    )
    assert unsupported_nodes(path) == [kind]
    assert str(kind) == "2 × com.microsoft.MatMulIntegerToFloat-1: no kernel"


def test_a_type_without_a_kernel(tmp_path: Path) -> None:
    path = write_graph(tmp_path, "(double[n] x) => (int64[1, m] y) { y = NonZero(x) }")
    (missing,) = unsupported_nodes(path)
    assert str(missing) == (
        "1 × ai.onnx.NonZero-13: T is double, and kernels take bool, float, float16, int32, int64, "
        "uint8"
    )
    path = write_graph(tmp_path, "(float[n] x) => (int64[1, m] y) { y = NonZero(x) }")
    assert unsupported_nodes(path) == []


def test_a_type_of_an_optional_input(tmp_path: Path) -> None:
    # Pad's first input is what counts: its axes, of another type, are under no constraint.
    body = "({0}[n] x, int64[2] pads, {0} zero, int32[1] axes) => ({0}[m] y) {{ y = Pad({1}) }}"
    for arguments in ("x, pads", "x, pads, zero", "x, pads, , axes"):
        assert counts(write_graph(tmp_path, body.format("float", arguments))) == {}
        lacking = {("Pad", "bfloat16"): 1}
        assert counts(write_graph(tmp_path, body.format("bfloat16", arguments))) == lacking


def test_types_of_operators_of_onnx_runtime(tmp_path: Path) -> None:
    # The result has the type of the query, or of A; otherwise Round would not be known to lack one.
    body = """({0}[1, n, 8] x, uint8[8, 1, 16] w, {0}[8] scales) => ({0}[1, n, 8] y) {{
        attended = com.microsoft.MultiHeadAttention <num_heads = 1> (x, x, x)
        product = com.microsoft.MatMulNBits <K = 8, N = 8, bits = 8, block_size = 16>
            (attended, w, scales)
        y = Round(product)
    }}"""
    assert counts(write_graph(tmp_path, body.format("float16"))) == {}
    lacking = {("Round", "bfloat16"): 1}
    assert counts(write_graph(tmp_path, body.format("bfloat16"))) == lacking


@pytest.mark.parametrize(("opset", "lacking"), [(21, {}), (22, {("MaxPool", ""): 1})])
def test_a_kernel_without_an_end_takes_no_later_version(
    opset: int, lacking: dict[tuple[str, str], int], tmp_path: Path
) -> None:
    # The kernel is for 12+, the operator of opset 21 is from 12 and that of opset 22 from 22.
    body = "(float[1, 1, n, n] x) => (float[1, 1, m, m] y) {y = MaxPool <kernel_shape=[2, 2]> (x)}"
    assert counts(write_graph(tmp_path, body, opset)) == lacking


@pytest.mark.parametrize(
    ("versions", "taken"),
    [("13+", {13}), ("13", {13}), ("11-13", {11, 12, 13}), ("7-11", {11})],
)
def test_versions_that_a_kernel_takes(versions: str, taken: set[int]) -> None:
    assert {v for v in range(11, 15) if kernel_table.covers(versions, v)} == taken


@pytest.mark.parametrize(
    ("op_type", "dtype", "lacking"),
    [
        ("Swish", "bfloat16", {}),  # nobody has a kernel, and all of the body has
        ("Clip", "bfloat16", {("Less", "bfloat16"): 1}),  # one part of the body has none
        ("Clip", "int32", {("Clip", "int32"): 1}),  # the processor has one, so it stays whole
        ("Elu", "float16", {("Elu", ""): 1}),  # the body is for an opset that is too old
    ],
)
def test_functions_without_a_kernel_are_expanded(
    op_type: str, dtype: str, lacking: dict[tuple[str, str], int], tmp_path: Path
) -> None:
    arguments = "x, x0" if op_type == "Clip" else "x"
    body = f"({dtype}[n] x, {dtype} x0) => ({dtype}[n] y) {{ y = {op_type}({arguments}) }}"
    assert counts(write_graph(tmp_path, body, opset=24)) == lacking


@pytest.mark.parametrize(
    "body",
    [
        "(float[n] x) => (float[n] y) { y = Swish(x) }",
        "(float[n] x, double z) => (double[n] y) { y = CastLike(x, z) }",
        '(double[n] x) => (double[n] y) { y = Gelu <approximate = "tanh"> (x) }',
        "(float[n, 4, h] x, float[4] s) => (float[n, 4, h] y) "
        "{ y = GroupNormalization <num_groups = 2> (x, s, s) }",
        "(double[1, n, 8] x) => (double[1, n, 8] y) "
        "{ y = Attention <q_num_heads = 2, kv_num_heads = 2> (x, x, x) }",
        "(float[n] x) => (float[n] y) { y = Elu(x) }",
    ],
)
def test_onnx_runtime_expands_the_same_functions(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_graph(tmp_path, body, opset=24)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.optimized_model_filepath = str(tmp_path / "expanded.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    expected = Counter(node.op_type for node in onnx.load(tmp_path / "expanded.onnx").graph.node)
    monkeypatch.setattr(missing_kernels, "TABLE", {**kernel_table.TABLE, "cuda": {}})
    model = ir.load(path)
    missing_kernels._infer_types(model.graph, 24)
    while missing_kernels._expand_functions(model, 24):
        missing_kernels._infer_types(model.graph, 24)
    found = Counter(node.op_type for node in model.graph)
    del found["Constant"]
    assert found == expected


def test_shapes_may_be_computed_without_a_kernel(tmp_path: Path) -> None:
    # BitwiseAnd has no kernel. It reads a shape and a constant, or what was computed from them.
    computed = """{
        one = Constant <value = int64[1] {1}> ()
        shape = Shape(x)
        odd = BitwiseAnd(shape, one)
        both = Concat <axis = 0> (odd, one)
        again = BitwiseAnd(both, one)
        y = Expand(x, again)
    }"""
    assert counts(write_graph(tmp_path, f"(float[1] x) => (float[a, b] y) {computed}")) == {}
    on_gpu = """{
        one = Constant <value = int64[1] {1}> ()
        shape = Shape(x)
        ones = Expand(one, shape)
        odd = BitwiseAnd(ones, one)
        y = Add(odd, one)
    }"""
    lacking = {("BitwiseAnd", ""): 1}
    assert counts(write_graph(tmp_path, f"(float[n] x) => (int64[n] y) {on_gpu}")) == lacking
    with_input = "{ shape = Shape(x)  z = Neg(x)  y = BitwiseAnd(shape, z) }"
    assert counts(write_graph(tmp_path, f"(int64[n] x) => (int64[n] y) {with_input}")) == lacking


@pytest.mark.parametrize(
    "node",
    [
        "If (c) <then_branch = t () => (double[n] a) {{ {0} }}, "
        "else_branch = e () => (double[n] b) {{ b = Neg(x) }}>",
        "Loop (i, c, x) <body = l (int64 k, bool before, double[n] z) => "
        "(bool after, double[n] a) {{ after = Identity(before)  {0} }}>",
    ],
)
def test_subgraphs_are_looked_into(node: str, tmp_path: Path) -> None:
    # The result is known to be double only if the subgraph was.
    body = "(bool c, int64 i, double[n] x) => (int64[1, m] y) {{ d = {0}  y = NonZero(d) }}"
    lacking = node.format("f = NonZero(x)  g = Cast <to = 11> (f)  a = Squeeze(g)")
    path = write_graph(tmp_path, body.format(lacking))
    assert counts(path) == {("NonZero", "double"): 2}
    path = write_graph(tmp_path, body.format(node.format("a = Neg(x)")))
    assert counts(path) == {("NonZero", "double"): 1}


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_weights_that_are_widened_piecewise(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(narrow_weights, "PIECE", 64)
    spec = ComponentSpec(
        name="layer", weights="layer", build=lambda: torch.nn.Linear(16, 24, bias=False),
        inputs=(GraphInput(name="x", shape=(1, "L", 16)),), outputs=("y",), axes={"L": 24},
    )  # fmt: skip
    model = trace(spec)
    ref = TensorRef("weight", dtype, (24, 16), tmp_path / "w.safetensors", 0, 768)
    attach_weights(model, {"weight": ref}, tmp_path)
    assert optimize_for_ort(model, few_rows=True)
    assert "Scan" in {node.op_type for node in model.graph}
    path = tmp_path / "engine.onnx"
    path.write_bytes(ir.to_proto(model).SerializeToString())
    assert unsupported_nodes(path) == []
