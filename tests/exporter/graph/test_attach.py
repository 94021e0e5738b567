"""Initialisers that lie in safetensors, run by ONNX Runtime against numpy."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto
from safetensors.numpy import save_file

from wanx.exporter.graph.attach import attach_weights
from wanx.files.safetensors import read_header

STORED = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": ml_dtypes.bfloat16}
ROWS, WIDTH = 7, 5


def build_model() -> ir.Model:
    """``out = table[ids] @ weight + weight[0]``, with weights that have no data."""
    shared = ir.TensorType(ir.DataType.FLOAT)  # as the weights of repeated blocks share theirs
    table, weight = (
        ir.Value(name=name, type=shared, shape=ir.Shape(shape))
        for name, shape in (("table", [ROWS, WIDTH]), ("weight", [WIDTH, WIDTH]))
    )
    ids = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["n"]))
    zero = ir.tensor(np.array(0), name="zero")
    constant = ir.Value(name="zero", const_value=zero, type=ir.TensorType(ir.DataType.INT64))
    rows = ir.node("Gather", [table, ids], {"axis": 0})
    product = ir.node("MatMul", [rows.outputs[0], weight])
    first = ir.node("Gather", [weight, constant], {"axis": 0})
    total = ir.node("Add", [product.outputs[0], first.outputs[0]])
    for number, node in enumerate((rows, product, first)):
        node.outputs[0].name = f"v{number}"
    out = total.outputs[0]
    out.name, out.type = "out", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [ids],
        [out],
        nodes=[rows, product, first, total],
        initializers=[table, weight, constant],
        opset_imports={"": 23},
        name="test",
    )
    return ir.Model(graph, ir_version=10)


def write_weights(root: Path, dtype: str) -> dict[str, NDArray[np.float32]]:
    """Store both tensors and return what they hold, in fp32."""
    generator = np.random.default_rng(0)
    stored = {
        "table": generator.standard_normal((ROWS, WIDTH)).astype(STORED[dtype]),
        "weight": generator.standard_normal((WIDTH, WIDTH)).astype(STORED[dtype]),
    }
    (root / "weights").mkdir()
    save_file(stored, root / "weights" / "w.safetensors")
    return {name: value.astype(np.float32) for name, value in stored.items()}


@pytest.mark.parametrize("dtype", STORED)
def test_graph_reads_the_stored_numbers(dtype: str, tmp_path: Path) -> None:
    values = write_weights(tmp_path, dtype)
    model = build_model()
    header = read_header(tmp_path / "weights" / "w.safetensors")
    assert attach_weights(model, header.entries, tmp_path) == {dtype: 2}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(tmp_path)
    )
    proto = ir.to_proto(model)
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    ids = np.array([6, 0, 3])
    (out,) = session.run(None, {"ids": ids})
    expected = values["table"][ids] @ values["weight"] + values["weight"][0]
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_constants_of_the_graph_stay_inside(tmp_path: Path) -> None:
    write_weights(tmp_path, "BF16")
    model = build_model()
    attach_weights(model, read_header(tmp_path / "weights" / "w.safetensors").entries, tmp_path)
    proto = ir.to_proto(model)
    external = {t.name for t in proto.graph.initializer if t.external_data}
    assert external == {"table", "weight"}
    locations = {
        e.value for t in proto.graph.initializer for e in t.external_data if e.key == "location"
    }
    assert locations == {"weights/w.safetensors"}


def test_a_table_is_not_cast_as_a_whole(tmp_path: Path) -> None:
    """umT5's table has 256,384 rows, of which a prompt needs a few."""
    write_weights(tmp_path, "BF16")
    model = build_model()
    attach_weights(model, read_header(tmp_path / "weights" / "w.safetensors").entries, tmp_path)
    proto = ir.to_proto(model)
    cast = {node.input[0] for node in proto.graph.node if node.op_type == "Cast"}
    assert "table" not in cast
    assert "weight" in cast


def test_wide_weights_need_no_cast(tmp_path: Path) -> None:
    write_weights(tmp_path, "F32")
    model = build_model()
    attach_weights(model, read_header(tmp_path / "weights" / "w.safetensors").entries, tmp_path)
    proto = ir.to_proto(model)
    assert all(node.op_type != "Cast" for node in proto.graph.node)
    assert {t.data_type for t in proto.graph.initializer if t.external_data} == {TensorProto.FLOAT}
