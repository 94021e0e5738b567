"""CUDA kernels that a graph needs and ONNX Runtime lacks, found on any machine.

A node without one runs on the processor between two copies of its tensors, or nowhere: the
processor has few kernels for bfloat16. ``cuda_kernels.json`` is ONNX Runtime's own table of its
kernels. It unites the rows that differ in types only: which types go together is not in it, nor
are shapes.

What becomes of a graph follows ONNX Runtime; each rule names the file that it mirrors.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx.shape_inference import infer_node_outputs
from onnx_ir.passes.common import InlinePass

Kernels = Mapping[str, Mapping[str, Mapping[str, Mapping[str, str]]]]
TABLE: Mapping[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_bytes())

# Kernels whose result lies in the processor's memory, and inputs that kernels read there: the
# ``OutputMemoryType`` and ``InputMemoryType`` that they are registered with, core/providers/cuda.
_WRITTEN_ON_CPU = {"Shape", "Size"}
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
_NEVER_ON_CPU = ("float16", "bfloat16", "float8")  # prefixes of the types

# The input whose type the result has, of operators that have no CUDA kernel and so no signature.
_LIKE_INPUT = {"MatMulIntegerToFloat": 2}
_EXPANDED = "expanded"  # domain of the bodies of operators that are functions


@dataclass(frozen=True, kw_only=True)
class MissingKernel:
    """Nodes for which there is no kernel, all for the same reason.

    Attributes:
        op_type: of the nodes.
        domain: of the nodes; ai.onnx is empty.
        since_version: opset that the graph's version of the operator is from.
        constraint: type constraint that no kernel meets; empty where that version has no kernel.
        found: type that the nodes have there.
        supported: types that kernels have there.
        count: how many nodes.
    """

    op_type: str
    domain: str
    since_version: int
    constraint: str = ""
    found: str = ""
    supported: tuple[str, ...] = ()
    count: int = 1

    def __str__(self) -> str:
        name = f"{self.count} × {self.domain or 'ai.onnx'}.{self.op_type}-{self.since_version}"
        if not self.constraint:
            return f"{name}: no kernel"
        return (
            f"{name}: {self.constraint} is {self.found}, kernels take {', '.join(self.supported)}"
        )


@dataclass(frozen=True, kw_only=True)
class _Signature:
    """Version of an operator, and (name, type or type constraint) of its inputs and outputs."""

    since_version: int
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]


def unsupported_nodes(graph: Path) -> list[MissingKernel]:
    """Find the nodes of a graph that ONNX Runtime has no CUDA kernel for.

    Weights are not read, and need not be there.

    Args:
        graph: the ONNX file, of opset 18 or later.

    Returns:
        One entry for each kind and reason, by operator. Nodes that ONNX Runtime leaves to the
        processor on purpose, as they compute shapes, are none.
    """
    model = InlinePass()(ir.load(graph)).model
    opset = model.opset_imports[""]
    _infer_types(model.graph, opset)
    while _expand_functions(model):
        _infer_types(model.graph, opset)
    counts = Counter(
        missing for part in _graphs(model) for missing in _missing_kernels(part, opset)
    )
    found = [replace(missing, count=count) for missing, count in counts.items()]
    return sorted(found, key=lambda missing: (missing.domain, missing.op_type, missing.found))


def _graphs(model: ir.Model) -> Iterator[ir.Graph]:
    yield model.graph
    yield from model.graph.subgraphs()


# Types of values ---------------------------------------------------------------------------------


def _infer_types(graph: ir.Graph, opset: int) -> None:
    """Set the type of every value; shapes are not needed, and unknown."""
    for node in graph:
        bodies = [a.as_graph() for a in node.attributes.values() if a.type == a.type.GRAPH]
        for body in bodies:
            # Inputs of a Scan's body are those of the node, of a Loop's the iteration comes first.
            given = list(node.inputs) if node.op_type == "Scan" else [None, *node.inputs]
            for formal, actual in zip(body.inputs, given, strict=False):
                if formal.type is None and actual is not None:
                    formal.type = _tensor(actual.dtype)
            _infer_types(body, opset)
        if bodies:
            # Before the results of a Loop's body stands its condition.
            results = bodies[0].outputs[1 if node.op_type == "Loop" else 0 :]
            types = [result.dtype for result in results]
        else:
            types = _output_types(node, opset)
        for output, dtype in zip(node.outputs, types, strict=True):
            output.type = _tensor(dtype)


def _tensor(dtype: ir.DataType | None) -> ir.TensorType | None:
    return None if dtype is None else ir.TensorType(dtype)


def _output_types(node: ir.Node, opset: int) -> list[ir.DataType | None]:
    if _has_schema(node):
        names = {value: f"input_{i}" for i, value in enumerate(node.inputs) if _exists(value)}
        types = {
            name: onnx.helper.make_tensor_type_proto(value.dtype, None)
            for value, name in names.items()
            if value.dtype is not None
        }
        if len(types) < len(names):
            return [None] * len(node.outputs)
        outputs = [f"output_{i}" for i, _ in enumerate(node.outputs)]
        call = _to_proto(node, [names.get(value, "") for value in node.inputs], outputs)
        inferred = infer_node_outputs(
            _schema(node.op_type, opset), call, types,
            opset_imports=[onnx.helper.make_opsetid("", opset)],
        )  # fmt: skip
        return [
            ir.DataType(inferred[name].tensor_type.elem_type) if name in inferred else None
            for name in outputs
        ]
    signature = _signature(node.domain, node.op_type, opset)
    if not signature.outputs:
        like = node.inputs[_LIKE_INPUT.get(node.op_type, 0)]
        return [None if like is None else like.dtype] * len(node.outputs)
    arguments = list(zip(signature.inputs, node.inputs, strict=False))
    return [
        next((value.dtype for (_, t), value in arguments if t == type_ and _exists(value)), None)
        for _, type_ in signature.outputs[: len(node.outputs)]
    ]


def _exists(value: ir.Value | None) -> bool:
    return value is not None and value.name != ""


def _to_proto(node: ir.Node, inputs: list[str], outputs: list[str]) -> onnx.NodeProto:
    call = onnx.helper.make_node(node.op_type, inputs, outputs)
    call.attribute.extend(ir.to_proto(attribute) for attribute in node.attributes.values())
    return call


def _has_schema(node: ir.Node) -> bool:
    return not node.domain and onnx.defs.has(node.op_type)


def _schema(op_type: str, opset: int) -> onnx.defs.OpSchema:
    return onnx.defs.get_schema(op_type, opset, "")


@functools.cache
def _signature(domain: str, op_type: str, opset: int) -> _Signature:
    if not domain and onnx.defs.has(op_type):
        schema = _schema(op_type, opset)
        return _Signature(
            since_version=schema.since_version,
            inputs=tuple((formal.name, formal.type_str) for formal in schema.inputs),
            outputs=tuple((formal.name, formal.type_str) for formal in schema.outputs),
        )
    sides = TABLE["signatures"][domain].get(op_type, ("", ""))
    inputs, outputs = (tuple(tuple(f.split(":")) for f in side.split()) for side in sides)
    return _Signature(since_version=1, inputs=inputs, outputs=outputs)


# Kernels -----------------------------------------------------------------------------------------


def _mismatch(kernels: Kernels, node: ir.Node, opset: int) -> MissingKernel | None:
    """Why none of the kernels takes a node: KernelRegistry, core/framework/kernel_registry.cc."""
    signature = _signature(node.domain, node.op_type, opset)
    about = MissingKernel(
        op_type=node.op_type, domain=node.domain, since_version=signature.since_version
    )
    mismatches = []
    for versions, constraints in kernels.get(node.domain, {}).get(node.op_type, {}).items():
        if not _covers(versions, signature.since_version):
            continue
        for constraint, types in constraints.items():
            found = _type_at(node, signature, constraint)
            if found is not None and found not in types.split():
                supported = tuple(types.split())
                mismatches.append(
                    replace(about, constraint=constraint, found=found, supported=supported)
                )
                break
        else:
            return None
    return mismatches[0] if mismatches else about


def _covers(versions: str, since_version: int) -> bool:
    """True if a kernel for ``13+``, ``13`` or ``7-12`` takes an operator of that version.

    ``13+`` takes no later one: a kernel without an end was written before a later version was.
    """
    first, _, last = versions.removesuffix("+").partition("-")
    return int(first) <= since_version <= int(last or first)


def _type_at(node: ir.Node, signature: _Signature, constraint: str) -> str | None:
    """The type that a constraint is about, which may be given by an argument's name too.

    ONNX Runtime looks at the first argument that is there, and at no other. None: at none.
    """
    formals = (*signature.inputs, *signature.outputs)
    # As many as there are formals: a variadic one is the last, and its first argument counts.
    inputs = [*node.inputs, *[None] * len(signature.inputs)][: len(signature.inputs)]
    for formal, value in zip(formals, (*inputs, *node.outputs), strict=False):
        if constraint in formal and _exists(value):
            assert value is not None
            return value.dtype.name.lower() if value.dtype else "unknown"
    return None


def _expand_functions(model: ir.Model) -> bool:
    """Replace operators that have no kernel anywhere and are functions of ONNX by their bodies.

    An operator that the processor has a kernel for is left to it: GraphPartitioner,
    core/framework/graph_partitioner.cc.

    Returns:
        Whether there were any.
    """
    opset = model.opset_imports[""]
    expanded: dict[bytes, ir.Function] = {}
    for node in [node for part in _graphs(model) for node in part]:
        if not _has_schema(node) or not _mismatch(TABLE["cuda"], node, opset):
            continue
        if not _mismatch(TABLE["cpu"], node, opset) or not (body := _body(node, opset)):
            continue
        if body not in expanded:
            proto = onnx.FunctionProto.FromString(body)
            proto.domain, proto.name = _EXPANDED, f"{node.op_type}_{len(expanded)}"
            # Its nodes become the model's, in the versions that the model imports.
            proto.opset_import[0].version = opset
            expanded[body] = ir.serde.deserialize_function(proto)
        node.domain, node.op_type, _ = expanded[body].identifier()
    model.functions.update({function.identifier(): function for function in expanded.values()})
    InlinePass()(model)
    return bool(expanded)


def _body(node: ir.Node, opset: int) -> bytes | None:
    schema = _schema(node.op_type, opset)
    if schema.has_context_dependent_function:
        versions = schema.context_dependent_function_opset_versions
        names = [f"input_{i}" if _exists(v) else "" for i, v in enumerate(node.inputs)]
        call = _to_proto(node, names, [f"output_{i}" for i, _ in enumerate(node.outputs)])
        types = [
            onnx.helper.make_tensor_type_proto(v.dtype, None) if v else onnx.TypeProto()
            for v in node.inputs
        ]
        return schema.get_context_dependent_function_with_opset_version(
            max(version for version in versions if version <= opset),
            call.SerializeToString(),
            [type_.SerializeToString() for type_ in types],
        )
    if schema.has_function:
        versions = schema.function_opset_versions
        return schema.get_function_with_opset_version(max(v for v in versions if v <= opset))
    return None


# Places ------------------------------------------------------------------------------------------


def _missing_kernels(graph: ir.Graph, opset: int) -> Iterator[MissingKernel]:
    """Nodes of one graph that lack a kernel, but for what the processor is to compute.

    A node that reads only what the processor has, and something that it has computed, stays with
    it: GetCpuPreferredNodes, core/framework/fallback_cpu_capability.cc. That is how shapes are
    computed. Here it goes for nodes without a kernel too, as nothing is copied for them.
    """
    on_cpu: set[ir.Value] = set()
    for node in graph:
        if node.op_type == "Constant":
            continue  # an initialiser for ONNX Runtime: the constructor of Graph, graph/graph.cc
        missing = _mismatch(TABLE["cuda"], node, opset)
        inputs = [value for value in node.inputs if value is not None and value.name]
        follows = any(value in on_cpu for value in inputs)
        stays = follows and all(value in on_cpu or _is_at_hand(value) for value in inputs)
        stays = stays and not any(_has_type(value, _NEVER_ON_CPU) for value in inputs)
        if missing and not stays:
            yield missing
        read = () if missing or node.domain else _READ_ON_CPU.get(node.op_type, ())
        # A kernel that reads its input there runs on the GPU all the same.
        stays = stays and not any(node.inputs[i] in on_cpu for i in read if i < len(node.inputs))
        written = not missing and not node.domain and node.op_type in _WRITTEN_ON_CPU
        if stays or written or (missing and follows):
            on_cpu.update(node.outputs)


def _is_at_hand(value: ir.Value) -> bool:
    """True for inputs of the graph and small constants, which the processor has anyway."""
    constant = ir.convenience.get_const_tensor(value)
    return value.is_graph_input() or (constant is not None and constant.size <= _SMALL)


def _has_type(value: ir.Value, prefixes: tuple[str, ...]) -> bool:
    return value.dtype is not None and value.dtype.name.lower().startswith(prefixes)
