"""ONNX graph of a segment for TensorRT: weights are inputs, scales are factors."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import torch

from wanx.exporter.graph.trace import OPSET, quiet_exporters
from wanx.exporter.partition.segments import Segment
from wanx.exporter.partition.stateless import example_arguments, export_segment
from wanx.exporter.targets.tensorrt.forms import DECOMPOSED, FUNCTION_BODIES
from wanx.exporter.targets.tensorrt.nodes import Replaced, use_plugins
from wanx.kernels.registry import ONNX_FUNCTIONS, OpsAsNodes
from wanx.models.vae import WanVAE

WEIGHT = "weight."  # goes before the names of inputs that are weights
OUTPUT = "out."  # before those of outputs, since a program may give what it takes


def segment_graph(segment: Segment, axes: Mapping[str, int]) -> onnx.ModelProto:
    """Trace a segment into standard ONNX operators.

    Its inputs are those of the segment and then ``weight.<name>`` for each parameter, its outputs
    ``out.<name>``, all of the types that the segment has them in.

    Args:
        segment: from :func:`wanx.exporter.partition.partition.cut`.
        axes: sizes to trace with.
    """
    graph, _ = graph_with_plugins(segment, axes, (), ())
    return graph


def graph_with_plugins(
    segment: Segment, axes: Mapping[str, int], plugins: Collection[str], sms: Sequence[int]
) -> tuple[onnx.ModelProto, Replaced]:
    """Trace a segment as :func:`segment_graph` does, and replace nodes by plug-ins.

    Args:
        segment: from :func:`wanx.exporter.partition.partition.cut`.
        axes: sizes to trace with.
        plugins: functions whose nodes become plug-ins with our kernels.
        sms: the GPUs that those are compiled for.

    Returns:
        The graph, and the counts of nodes that were replaced and left.
    """
    device = torch.device("cpu")
    with quiet_exporters(), OpsAsNodes():
        program = export_segment(segment, axes, device)
    with quiet_exporters(), torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        exported = torch.onnx.export(
            program,
            example_arguments(segment, axes, device),
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            input_names=[
                *(item.name for item in segment.inputs),
                *(f"{WEIGHT}{name}" for name, _ in segment.parameters),
            ],
            output_names=[f"{OUTPUT}{name}" for name in segment.outputs],
            verbose=False,
        )
    assert exported is not None
    model = exported.model
    _scales_as_factors(model)
    _signed_weights(model)
    types = {parameter.dtype for _, parameter in segment.parameters}
    decompose = types == {torch.float32} or isinstance(segment.module, WanVAE)
    functions = ONNX_FUNCTIONS | FUNCTION_BODIES | (DECOMPOSED if decompose else {})
    used = {node.op_type for node in model.graph if node.domain == "wanx"}
    for name in sorted(used):
        body = ir.serde.deserialize_function(functions[name].to_function_proto())
        model.functions[body.identifier()] = body
    replaced = Replaced(plugins={}, unsupported={})
    if plugins:
        replaced = use_plugins(model, plugins, sms, functions)
    proto = onnx.inliner.inline_local_functions(_unnamed(ir.to_proto(model)))
    return _unnamed(proto), replaced


def _scales_as_factors(model: ir.Model) -> None:
    """Divide by the scale of each QuantizeLinear before it, and leave it 1."""
    one = ir.Value(name="unit_scale", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.FLOAT))
    one.const_value = ir.tensor(np.float32(1), name=one.name)
    quantizers = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    if quantizers:
        model.graph.initializers["unit_scale"] = one
    for number, node in enumerate(quantizers):
        divide = ir.node("Div", [node.inputs[0], node.inputs[1]])
        divide.outputs[0].name = f"in_steps_{number}"
        model.graph.insert_before(node, divide)
        node.replace_input_with(0, divide.outputs[0])
        node.replace_input_with(1, one)


def _signed_weights(model: ir.Model) -> None:
    """Take weights of uint8 as int8, from which 128 is taken off already."""
    for value in model.graph.inputs:
        if value.dtype != ir.DataType.UINT8:
            continue
        value.type = ir.TensorType(ir.DataType.INT8)
        for gather in [user for user, _ in value.uses() if user.op_type == "Gather"]:
            gather.outputs[0].type = ir.TensorType(ir.DataType.INT8)
            ((cast, _),) = gather.outputs[0].uses()
            ((centred, _),) = cast.outputs[0].uses()
            assert (cast.op_type, centred.op_type) == ("Cast", "Sub")
            centred.outputs[0].replace_all_uses_with(cast.outputs[0])
            model.graph.remove(centred, safe=True)


def _unnamed(model: onnx.ModelProto) -> onnx.ModelProto:
    """Clear the names of nodes, which the parser wants to be different in all functions."""
    for function in model.functions:
        for node in function.node:
            node.ClearField("name")
    for node in model.graph.node:
        node.ClearField("name")
    return model
