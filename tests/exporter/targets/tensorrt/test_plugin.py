"""What TensorRT for RTX builds of graphs with the plug-in, for two GPUs at once.

Plans are only built: loading them takes a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.plugins import CASES
from tests.support.rtx_builds import needs_rtx, run

CARRIED = """
from wanx.bundle.plugin_kernel import read_plugin_kernel
made = {}
for name, case in CASES.items():
    model = model_of(case)
    use_plugins(model, {case.op}, [89, 120])
    (node,) = model.graph
    fields = node.attributes["description"].value.encode(), node.attributes["code"].value.tobytes()
    kernel = read_plugin_kernel(*fields)
    plan, problem = build(model, lambda name: name not in ("in4", "in5"))
    assert plan, (name, problem, log.lines[-5:])
    carried = [plan.count(kernel.variant_for(sm)[1]) for sm in (89, 120)]
    kinds = [kind for kind, *_ in layers()]
    made[name] = {"carried": carried, "described": plan.count(fields[0]), "layers": kinds,
                  "functions": len(model.functions)}
found = made
"""
ORDER = """
model = model_of(CASES["rope"])
use_plugins(model, {"RMSNormRope"}, [89, 120])
graph = model.graph
(node,) = graph
for place, kind in enumerate(("Relu", "Exp")):
    given, made = graph.inputs[place], graph.outputs[place]
    before, after = ir.node(kind, [given]), ir.node(kind, [made])
    for extra, like, name in ((before, given, "before"), (after, made, "after")):
        (value,) = extra.outputs
        value.name, value.shape, value.type = f"{name}{place}", like.shape, like.type
    graph.insert_before(node, before)
    node.replace_input_with(place, before.outputs[0])
    graph.append(after)
    graph.outputs[place] = after.outputs[0]
plan, problem = build(model, lambda name: name not in ("in4", "in5"))
assert plan, problem
found = layers()
"""
RUN_TIME = """
from types import SimpleNamespace
import numpy as np
from tests.support.plugins import ListeningDriver
from wanx.exporter.targets.tensorrt.kernels import compile_plugin_kernel
from wanx.runtime.sessions.tensorrt import launch
case = CASES["gelu, fp8"]
kernel = compile_plugin_kernel(case.op, case.inputs, case.attributes, [89])
driver = ListeningDriver(89, [8] * 6)
launch.cuda_driver = lambda: driver
fields = trt.PluginFieldCollection([
    trt.PluginField(name, np.frombuffer(data, np.int8), kind)
    for name, data, kind in zip(
        ("description", "code"), kernel.fields(),
        (trt.PluginFieldType.CHAR, trt.PluginFieldType.INT8))
])
plugin = creator.create_plugin("it", fields, trt.TensorRTPhase.RUNTIME)
steps = []
def step(function, *arguments):
    driver.calls.clear()
    try:
        result = function(*arguments)
    except Exception as error:
        result = f"{error}"
    steps.append([[call[0] for call in driver.calls], creator.problem])
    return result
described = lambda *shapes: [SimpleNamespace(dims=shape) for shape in shapes]
attached = step(plugin.attach_to_context, None)
step(attached.on_shape_change, described((2, 1000, 8960), (1,)), described((2, 1000, 8960)))
driver.capturing = True
step(attached.enqueue, [], [], [16, 32], [48], 0, 5)
step(attached.clone().get_fields_to_serialize)
step(attached.on_shape_change, described((2, 1000, 8961), ()), [])
driver.capturing, driver.sm = False, 120
step(plugin.attach_to_context, None)
found = steps
"""
FOREIGN = """
import numpy as np
problems = []
code = ir.AttrTensor("code", ir.tensor(np.zeros(4, np.int8), name="code"))
for attributes in (
    [], [code], [ir.AttrString("description", "{}")], [ir.AttrString("description", "{}"), code],
    [ir.AttrString("description", "x" * 300000), code],
):
    model = model_of(CASES["rope"])
    (node,) = model.graph
    foreign = ir.Node("wanx", "WanxTriton", node.inputs, attributes, num_outputs=2, name="it")
    for old, new in zip(node.outputs, foreign.outputs):
        new.name, new.type, new.shape = old.name, old.type, old.shape
    ir.convenience.replace_nodes_and_values(
        model.graph, node, [node], [foreign], node.outputs, foreign.outputs)
    creator.problem = None
    plan, problem = build(model, lambda name: True)
    assert plan is None
    problems.append(problem)
found = problems
"""


@pytest.fixture(scope="module")
def snippets() -> dict[str, Any]:
    return run({"carried": CARRIED, "order": ORDER, "run time": RUN_TIME, "foreign": FOREIGN})


@needs_rtx
def test_every_kernel_is_carried_for_every_gpu(snippets: dict[str, Any]) -> None:
    found = snippets["carried"]
    assert found.keys() == CASES.keys()
    for name, facts in found.items():
        # A plan for two GPUs is two plans, each with all that the plug-in has.
        assert facts["carried"] == [2, 2], name
        assert facts["described"] == 2, name
        assert facts["functions"] == 0, name


@needs_rtx
def test_a_plugin_keeps_the_order_of_its_tensors(snippets: dict[str, Any]) -> None:
    """TensorRT names what it copies by itself, so that only its neighbours tell what is what."""
    found = snippets["order"]
    custom = next(layer for layer in found if layer[0] == "custom_layer")
    for place in (0, 1):
        assert ["kgen", [[f"in{place}", "BFloat16"]], [custom[1][place]]] in found
        assert ["kgen", [custom[2][place]], [[f"after{place}", "BFloat16"]]] in found
    assert [name for name, _ in custom[1][2:]] == ["in2", "in3", "in4", "in5"]


@needs_rtx
def test_code_is_loaded_before_anything_is_launched(snippets: dict[str, Any]) -> None:
    """What TensorRT calls at run time, in its order; a failure is kept where it can be read."""
    found = snippets["run time"]
    loads, shape, launch, fields, another, foreign = found
    assert "cuModuleLoadData" in loads[0]
    assert [shape, launch, fields] == [[[], None], [["cuLaunchKernel"], None], [[], None]]
    assert another[0] == []
    assert "not [2, 1000, 8961]" in another[1]
    assert "built for sm89, and this GPU is sm120" in foreign[1]


@needs_rtx
def test_foreign_fields_are_refused_in_one_line(snippets: dict[str, Any]) -> None:
    found = snippets["foreign"]
    assert ["has no code" in problem or "has no description" in problem for problem in found] == [
        True, True, True, False, False,
    ]  # fmt: skip
    assert all("build the engine again" in problem for problem in found)
    assert not any("\n" in problem for problem in found)
