"""Weights of 16 bits that are widened in pieces, against the product with the whole weight."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.support.peers import relative_error
from wanx.exporter.components import ComponentSpec, GraphInput
from wanx.exporter.graph.attach import attach_weights
from wanx.exporter.graph.trace import trace
from wanx.exporter.targets.onnxruntime import narrow_weights
from wanx.exporter.targets.onnxruntime.graph import optimize_for_ort
from wanx.files.safetensors import read_header
from wanx.runtime.sessions.onnxruntime.loading import create_session


class Layers(nn.Module):
    """Two layers that read the same input, of which the second has a bias, and one behind them."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.a = nn.Linear(k, n, bias=False)
        self.b = nn.Linear(k, n)
        self.c = nn.Linear(n, k, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.a(x) * self.b(x))


def build(folder: Path, k: int, n: int, dtype: torch.dtype) -> tuple[ir.Model, Layers]:
    torch.manual_seed(0)
    module = Layers(k, n).to(dtype)
    save_file(dict(module.state_dict()), folder / "w.safetensors")
    spec = ComponentSpec(
        name="module", weights="module", outputs=("y",), axes={"L": 24},
        build=lambda: Layers(k, n), inputs=(GraphInput(name="x", shape=(1, "L", k)),),
    )  # fmt: skip
    model = trace(spec)
    attach_weights(model, read_header(folder / "w.safetensors").entries, folder)
    return model, module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize(("k", "n"), [(24, 40), (7, 130), (130, 64)])
def test_the_same_product(
    k: int, n: int, rows: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(narrow_weights, "PIECE", 5 * max(k, n))
    model, module = build(tmp_path, k, n, dtype)
    assert optimize_for_ort(model, few_rows=True)
    (tmp_path / "engine.onnx").write_bytes(ir.to_proto(model).SerializeToString())
    onnx.checker.check_model(tmp_path / "engine.onnx")
    x = torch.randn(1, rows, k)
    session = create_session(tmp_path / "engine.onnx", tmp_path, threads=1, fold=False)
    y = session.run(None, {"x": x.numpy()})[0]
    assert relative_error(y, module.double()(x.double()).detach()) <= 1e-5


def test_a_weight_of_one_piece_stays(tmp_path: Path) -> None:
    model, _ = build(tmp_path, 24, 40, torch.bfloat16)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert not optimize_for_ort(model, few_rows=True)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_weights_of_32_bits_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow_weights, "PIECE", 100)
    model, _ = build(tmp_path, 24, 40, torch.float32)
    assert not optimize_for_ort(model, few_rows=True)


def test_no_whole_weight_becomes_wide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow_weights, "PIECE", 100)
    model, _ = build(tmp_path, 24, 40, torch.bfloat16)
    assert optimize_for_ort(model, few_rows=True)
    graph = tmp_path / "engine.onnx"
    graph.write_bytes(ir.to_proto(model).SerializeToString())
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(tmp_path)
    )
    onnxruntime.InferenceSession(
        graph.read_bytes(), options, providers=["CPUExecutionProvider"],
        disabled_optimizers=["ConstantFolding"],
    )  # fmt: skip
    kept = {
        tensor.data_type
        for tensor in onnx.load(tmp_path / "optimised.onnx").graph.initializer
        if np.prod(tensor.dims) == 24 * 40
    }
    assert kept == {onnx.TensorProto.BFLOAT16}
    assert ml_dtypes.bfloat16  # what onnx reads such numbers as
