"""Graphs of one node, and Python that builds engines of graphs for two GPUs at once.

That Python runs in a process of its own: here kernels are interpreted, and another test may have
loaded TensorRT before its library was made known.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import onnx_ir as ir
import pytest
import torch

import wanx.kernels.adaln_quantize
import wanx.kernels.gelu_quantize
import wanx.kernels.rms_norm_rope_quantize  # noqa: F401  # they register their functions
from tests.support.paths import ROOT
from tests.support.plugins import Case
from wanx.exporter.targets.tensorrt import nodes
from wanx.kernels.registry import DOMAIN, ONNX_FUNCTIONS

TYPES = {dtype: kind for kind, dtype in nodes._TYPES.items()}
needs_rtx = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed"
)
# Each snippet leaves its result in `found`.
RUN = """
made = {}
for name, code in json.loads(sys.argv[1]).items():
    scope = dict(globals())
    exec(code, scope)
    made[name] = scope["found"]
print(json.dumps(made))
"""
SETUP = """
import json, re, sys
from pathlib import Path
import onnx_ir as ir
from tests.support.plugins import CASES
from tests.support.rtx_builds import model_of
from wanx.exporter.targets.tensorrt.nodes import use_plugins
from wanx.runtime.sessions.tensorrt.library import import_tensorrt
from wanx.runtime.sessions.tensorrt.plugin import register
trt = import_tensorrt("tensorrt_rtx")
creator = register(trt)
assert register(trt) is creator
class Log(trt.ILogger):
    def __init__(self):
        super().__init__()
        self.lines = []
    def log(self, severity, message):
        self.lines.append(message)
log = Log()
def build(model, batched):
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    log.lines.clear()
    if not parser.parse(ir.to_proto(model).SerializeToString()):
        return None, creator.problem
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 2
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    config.set_compute_capability(trt.ComputeCapability.SM120, 1)
    profile = builder.create_optimization_profile()
    for place in range(network.num_inputs):
        item = network.get_input(place)
        shape = tuple(item.shape)
        if -1 in shape:
            sizes = [
                tuple(
                    n if n != -1 else batch if axis == 0 and batched(item.name) else length
                    for axis, n in enumerate(shape)
                )
                for batch, length in ((1, 1024), (1, 32760), (2, 75600))
            ]
            profile.set_shape(item.name, *sizes)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    return None if plan is None else bytes(plan), creator.problem
LAYER = re.compile(r"Name: (\\S+), LayerType: (\\w+), Inputs: \\[(.*?)\\], Constants:.*?Outputs: \\[(.*?)\\], Tac")
VALUE = re.compile(r"Name: ([^,]+), .*?Datatype: (\\w+)")
def layers():
    return [
        (kind, VALUE.findall(given), VALUE.findall(made))
        for line in log.lines for _, kind, given, made in LAYER.findall(line)
    ]
"""  # noqa: E501


def run(snippets: dict[str, str]) -> dict[str, Any]:
    """What each snippet finds, in one process where kernels are compiled."""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", SETUP + RUN, json.dumps(snippets)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def model_of(case: Case) -> ir.Model:
    """A graph of one node, with the function that it has outside TensorRT."""
    inputs = [
        ir.Value(name=f"in{i}", shape=ir.Shape(s.shape), type=ir.TensorType(TYPES[s.dtype]))
        for i, s in enumerate(case.inputs)
    ]
    attributes = [
        ir.AttrFloat32(n, v) if isinstance(v, float) else ir.AttrInt64(n, v)
        for n, v in case.attributes.items()
    ]
    count = 2 if case.op.startswith("RMSNormRope") else 1
    node = ir.Node(DOMAIN.domain, case.op, inputs, attributes, num_outputs=count, name="it")
    kind = {3: torch.int8, 17: torch.float8_e4m3fn}[case.attributes.get("dtype", 17)]
    dtype = case.inputs[0].dtype if case.op == "RMSNormRope" else kind
    for i, value in enumerate(node.outputs):
        value.name, value.shape = f"out{i}", ir.Shape(case.inputs[0].shape)
        value.type = ir.TensorType(TYPES[dtype])
    imports = {"": 23, DOMAIN.domain: 1}
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports=imports, name="g")
    body = ir.serde.deserialize_function(ONNX_FUNCTIONS[case.op].to_function_proto())
    return ir.Model(graph, ir_version=10, functions=[body])
