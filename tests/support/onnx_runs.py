"""Runs 8-bit ops in ONNX Runtime: an ONNX function by itself, or what is traced from a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx import TensorProto, helper
from onnxscript import OnnxFunction
from torch import Tensor, nn

from wanx.exporter.components import ComponentSpec, GraphInput
from wanx.exporter.graph.trace import trace
from wanx.runtime.sessions.onnxruntime.loading import session_options

TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.float8_e4m3fn: TensorProto.FLOAT8E4M3FN,
}


def run_function(
    function: OnnxFunction, inputs: Sequence[Tensor], outputs: int = 1, **attributes: Any
) -> list[Tensor]:
    """Run a model of one node, whose outputs have as many axes as its first input.

    Inputs are cast inside to their types, outputs to fp32.
    """
    names = [f"x{i}" for i in range(len(inputs))]
    results = [f"y{i}" for i in range(outputs)]
    casts = [
        helper.make_node("Cast", [f"{name}.wide"], [name], to=TYPES[value.dtype])
        for name, value in zip(names, inputs, strict=True)
    ]
    node = helper.make_node(
        function.name, names, [f"{name}.raw" for name in results], domain="wanx", **attributes
    )
    widen = [helper.make_node("Cast", [f"{n}.raw"], [n], to=TensorProto.FLOAT) for n in results]
    graph = helper.make_graph(
        [*casts, node, *widen],
        "op",
        [
            helper.make_tensor_value_info(f"{name}.wide", TensorProto.FLOAT, value.shape)
            for name, value in zip(names, inputs, strict=True)
        ],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * inputs[0].ndim)
            for name in results
        ],
    )
    model = helper.make_model(
        graph,
        functions=[function.to_function_proto()],
        opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("wanx", 1)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    session = _session(model, onnxruntime.SessionOptions())
    feeds = {f"{n}.wide": v.float().numpy() for n, v in zip(names, inputs, strict=True)}
    return [torch.from_numpy(np.asarray(value)) for value in session.run(results, feeds)]


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A module's graph with its weights, and what ONNX Runtime makes of it."""

    model: ir.Model
    session: onnxruntime.InferenceSession
    optimised: list[str]

    def run(self, *inputs: Tensor) -> list[Tensor]:
        names = [item.name for item in self.session.get_inputs()]
        feeds = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return [torch.from_numpy(np.asarray(value)) for value in self.session.run(None, feeds)]


def traced(
    build: Callable[[], nn.Module],
    weights: Mapping[str, Tensor],
    inputs: Sequence[GraphInput],
    folder: Path,
    *,
    outputs: int = 1,
    config: Mapping[str, str] | None = None,
) -> Traced:
    """Trace what ``build`` makes, attach ``weights`` by name, and open a session.

    ``config`` holds entries of the session's configuration.
    """
    spec = ComponentSpec(
        name="module", weights="module", build=build, inputs=tuple(inputs),
        outputs=tuple(f"y{i}" for i in range(outputs)), axes={"L": 24},
    )  # fmt: skip
    model = trace(spec)
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            value.const_value = ir.tensor(as_numpy(weights[name]), name=name)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    for key, entry in (config or {}).items():
        options.add_session_config_entry(key, entry)
    session = _session(proto, options)
    optimised = [n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node]
    return Traced(model=model, session=session, optimised=optimised)


def as_numpy(tensor: Tensor) -> np.ndarray:
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    return tensor.numpy()


def _session(
    model: onnx.ModelProto, options: onnxruntime.SessionOptions
) -> onnxruntime.InferenceSession:
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def optimised(graph: Path, root: Path) -> onnx.GraphProto:
    """What ONNX Runtime makes of a graph before it runs it."""
    data = graph.read_bytes()
    options = session_options(root, threads=1, graph=data)
    options.optimized_model_filepath = str(root / "optimised.onnx")
    onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return onnx.load(root / "optimised.onnx").graph
