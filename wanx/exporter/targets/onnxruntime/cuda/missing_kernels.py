"""CUDA kernels that a graph needs and ONNX Runtime lacks, found on any machine.

A node without one runs on the processor between two copies of its tensors, or nowhere: the
processor has few kernels for bfloat16.

What becomes of a graph follows ONNX Runtime; each rule names the file that it mirrors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx.helper import make_node, make_opsetid, make_tensor_type_proto
from onnx.shape_inference import infer_node_outputs
from onnx_ir.passes.common import InlinePass

from wanx.exporter.targets.onnxruntime.cuda.kernel_table import (
    TABLE,
    MissingKernel,
    has_schema,
    missing_kernel,
    schema_of,
    signature_of,
)

# Kernels whose result lies in the processor's memory, and inputs that kernels read there: the
# ``OutputMemoryType`` and ``InputMemoryType`` that they are registered with, core/providers/cuda.
_WRITTEN_ON_CPU = ("Shape", "Size")
_READ_ON_CPU = {
    **dict.fromkeys(("Expand", "Reshape", "Split", "Squeeze", "Tile", "Unsqueeze"), (1,)),
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"), (1,)),
    "Clip": (1, 2),
    "ConstantOfShape": (0,),
    "Pad": (1, 2, 3),
    "Range": (0, 1, 2),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
}
_SMALL = 100  # numbers of an initialiser that may stay with the processor
_NEVER_ON_CPU = ("float16", "bfloat16", "float8")  # what the names of such types begin with

# The input whose type the result has, of operators without a CUDA kernel and so without signature.
_LIKE_INPUT = {"MatMulIntegerToFloat": 2}
_EXPANDED = "expanded"  # domain of the bodies of operators that are functions


def unsupported_nodes(graph: Path) -> list[MissingKernel]:
    """Find the nodes of a graph that ONNX Runtime has no CUDA kernel for.

    Weights are not read, and need not be there.

    Args:
        graph: the ONNX file, of opset 18 or later.

    Returns:
        One entry for each kind and reason, by operator. Nodes that ONNX Runtime leaves to the
        processor on purpose, as they compute shapes, are none.

    Raises:
        onnx.checker.ValidationError: a node has types that ONNX does not allow.
    """
    model = InlinePass()(ir.load(graph)).model
    opset = model.opset_imports[""]
    _infer_types(model.graph, opset)
    while _expand_functions(model, opset):
        _infer_types(model.graph, opset)
    kinds = Counter(kind for part in _graphs(model) for kind in _missing_kernels(part, opset))
    missing = (replace(kind, count=count) for kind, count in kinds.items())
    return sorted(missing, key=lambda kind: (kind.domain, kind.op_type, kind.found))


def _graphs(model: ir.Model) -> list[ir.Graph]:
    return [model.graph, *model.graph.subgraphs()]


def _infer_types(graph: ir.Graph, opset: int) -> None:
    """Set the type of every value. Shapes are not needed, and stay unknown."""
    for node in graph:
        bodies = [
            a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH
        ]
        for body in bodies:
            for formal, actual in zip(body.inputs, node.inputs, strict=False):
                if formal.type is None and actual is not None:
                    formal.type = actual.type
            _infer_types(body, opset)
        if bodies:
            # The results of a Loop's body come after its condition.
            results = bodies[0].outputs[node.op_type == "Loop" :]
            types = [result.dtype for result in results]
        else:
            types = _output_types(node, opset)
        for output, dtype in zip(node.outputs, types, strict=True):
            output.type = None if dtype is None else ir.TensorType(dtype)


def _output_types(node: ir.Node, opset: int) -> list[ir.DataType | None]:
    if has_schema(node):
        call, inputs = _call(node)
        known = {name: type_ for name, type_ in inputs.items() if type_.tensor_type.elem_type}
        if len(known) < len(inputs):
            return [None] * len(node.outputs)
        types = infer_node_outputs(
            schema_of(node.op_type, opset), call, known, opset_imports=[make_opsetid("", opset)]
        )
        inferred = [types.get(name, onnx.TypeProto()).tensor_type.elem_type for name in call.output]
        return [ir.DataType(number) if number else None for number in inferred]
    signature = signature_of(node.domain, node.op_type, opset)
    if not signature.outputs:
        like = node.inputs[_LIKE_INPUT.get(node.op_type, 0)]
        return [None if like is None else like.dtype] * len(node.outputs)
    arguments = [
        (constraint, value)
        for (_, constraint), value in zip(signature.inputs, node.inputs, strict=False)
        if value is not None and value.name
    ]
    return [
        next((value.dtype for other, value in arguments if other == constraint), None)
        for _, constraint in signature.outputs[: len(node.outputs)]
    ]


def _call(node: ir.Node) -> tuple[onnx.NodeProto, dict[str, onnx.TypeProto]]:
    """A node in the form that ONNX's own functions take, and the types of its inputs."""
    there = {f"in_{i}": value for i, value in enumerate(node.inputs) if value and value.name}
    names = [f"in_{i}" if f"in_{i}" in there else "" for i in range(len(node.inputs))]
    call = make_node(node.op_type, names, [f"out_{i}" for i in range(len(node.outputs))])
    call.attribute.extend(ir.to_proto(attribute) for attribute in node.attributes.values())
    unknown = ir.DataType.UNDEFINED
    types = {n: make_tensor_type_proto(v.dtype or unknown, None) for n, v in there.items()}
    return call, types


def _expand_functions(model: ir.Model, opset: int) -> bool:
    """Replace operators that are functions of ONNX, and have no kernel, by their bodies.

    One that the processor has a kernel for is left to it: PartitionOnnxFormatModel,
    core/framework/graph_partitioner.cc.

    Returns:
        Whether there were any.
    """
    for node in [node for part in _graphs(model) for node in part if has_schema(node)]:
        if not all(missing_kernel(TABLE[where], node, opset) for where in ("cuda", "cpu")):
            continue
        schema = schema_of(node.op_type, opset)
        for name, attribute in schema.attributes.items():
            # The body may refer to it.
            if attribute.default_value.name and name not in node.attributes:
                node.attributes[name] = ir.from_proto(attribute.default_value)
        if (proto := _body(node, schema, opset)) is not None:
            proto.domain, proto.name = _EXPANDED, f"{node.op_type}_{len(model.functions)}"
            # Its nodes become the model's, in the versions that the model imports.
            proto.opset_import[0].version = opset
            del proto.output[len(node.outputs) :]
            function = ir.serde.deserialize_function(proto)
            model.functions[function.identifier()] = function
            node.domain, node.op_type = function.domain, function.name
    return InlinePass()(model).modified


def _body(node: ir.Node, schema: Any, opset: int) -> onnx.FunctionProto | None:
    body = onnx.FunctionProto()
    if schema.has_context_dependent_function:
        version = max(v for v in schema.context_dependent_function_opset_versions if v <= opset)
        call, types = _call(node)
        arguments = [types.get(name, onnx.TypeProto()) for name in call.input]
        body.ParseFromString(
            schema.get_context_dependent_function_with_opset_version(
                version,
                call.SerializeToString(),
                [type_.SerializeToString() for type_ in arguments],
            )
        )
        return body
    versions = [version for version in schema.function_opset_versions if version <= opset]
    if not versions:
        return None
    version = max(versions)
    body.ParseFromString(schema.get_function_with_opset_version(version))
    # None whose operators have other versions by now: OpSchema::GetFunction, onnx/defs/schema.cc.
    then, now = (
        [schema_of(inner.op_type, opset).since_version for inner in body.node]
        for opset in (version, opset)
    )
    return body if then == now else None


def _missing_kernels(graph: ir.Graph, opset: int) -> Iterator[MissingKernel]:
    """Nodes of one graph that lack a kernel, but for those that the processor shall run.

    One that reads a value in the processor's memory, and else only such values, inputs of the
    graph and small constants, stays there: GetCpuPreferredNodes,
    core/framework/fallback_cpu_capability.cc. That is how shapes are computed. Here it goes for
    nodes without a kernel too, since nothing is copied for them.
    """
    on_cpu: set[ir.Value] = set()
    for node in graph:
        if node.op_type == "Constant":
            continue  # the constructor of Graph makes it an initialiser: core/graph/graph.cc
        missing = missing_kernel(TABLE["cuda"], node, opset)
        inputs = [value for value in node.inputs if value is not None and value.name]
        follows = any(value in on_cpu for value in inputs)
        stays = follows and all(
            (value in on_cpu or value in graph.inputs or _is_small(value)) and not _is_narrow(value)
            for value in inputs
        )
        if missing and not stays:
            yield missing
        # A kernel that reads its input there runs on the GPU all the same.
        read = () if missing or node.domain else _READ_ON_CPU.get(node.op_type, ())
        stays = stays and not any(node.inputs[i] in on_cpu for i in read if i < len(node.inputs))
        if stays or (missing and follows) or node.op_type in _WRITTEN_ON_CPU:
            on_cpu.update(node.outputs)


def _is_small(value: ir.Value) -> bool:
    constant = ir.convenience.get_const_tensor(value)
    return constant is not None and constant.size <= _SMALL


def _is_narrow(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.name.lower().startswith(_NEVER_ON_CPU)
