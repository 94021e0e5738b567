"""Replacement of ``wanx`` nodes by the TensorRT plug-in that holds our kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import OnnxFunction

from wanx.bundle.plugin_kernel import PluginKernel
from wanx.config.number_formats import WEIGHTS
from wanx.exporter.targets.tensorrt.kernels import compile_plugin_kernel
from wanx.exporter.targets.tensorrt.ops import OPS, Spec
from wanx.kernels.registry import DOMAIN, ONNX_FUNCTIONS
from wanx.runtime.sessions.tensorrt.plugin import CODE, DESCRIPTION, PLUGIN

_TYPES = {ir.DataType(row.onnx): getattr(torch, row.torch) for row in WEIGHTS}
# TensorRT runs the product best itself, and leaves what follows it.
_SPLIT = "QuantLinearGeluQuantize"
_PARTS = ("QuantLinear", "GeluQuantize")


@dataclass(frozen=True, kw_only=True)
class Replaced:
    """Counts of the nodes of a graph, by type.

    Attributes:
        plugins: nodes that are plug-ins now.
        unsupported: nodes that keep their bodies, by the reason.
    """

    plugins: dict[str, int]
    unsupported: dict[str, dict[str, int]]


def use_plugins(
    model: ir.Model,
    ops: Collection[str],
    sms: Sequence[int],
    functions: Mapping[str, OnnxFunction[..., Any]] = ONNX_FUNCTIONS,
) -> Replaced:
    """Replace nodes of a model in place; bodies that nothing calls any more are dropped.

    With ``GeluQuantize`` among ``ops``, a product with it behind it is taken apart first.

    Args:
        model: as exported, each value with its type and shape.
        ops: node types, of :data:`wanx.exporter.targets.tensorrt.ops.OPS`.
        sms: GPUs to compile for, such as 89.
        functions: bodies by node type, for nodes that this adds.

    Raises:
        KeyError: there is no kernel for a type.
        WanxError: as :func:`wanx.exporter.targets.tensorrt.kernels.compile_plugin_kernel`.
    """
    if unknown := set(ops) - OPS.keys():
        raise KeyError(f"no plug-in for {', '.join(sorted(unknown))}")
    if _PARTS[1] in ops:
        _take_apart(model, functions)
    kernels: dict[str, PluginKernel] = {}
    counts: dict[str, int] = {}
    unsupported: dict[str, dict[str, int]] = {}
    for node in _nodes(model, ops):
        inputs, attributes = _specs(node), {n: a.value for n, a in node.attributes.items()}
        reason = _unsupported(node.op_type, inputs, attributes)
        if reason is not None:
            reasons = unsupported.setdefault(node.op_type, {})
            reasons[reason] = reasons.get(reason, 0) + 1
            continue
        assert not any(spec is None for spec in inputs)
        specs = [spec for spec in inputs if spec is not None]
        key = repr((node.op_type, specs, sorted(attributes.items())))
        if key not in kernels:
            kernels[key] = compile_plugin_kernel(node.op_type, specs, attributes, sms)
        _replace(node, [_plugin_node(node, kernels[key])])
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    _drop_unused(model)
    return Replaced(plugins=counts, unsupported=unsupported)


def _nodes(model: ir.Model, types: Iterable[str]) -> list[ir.Node]:
    op_types = set(types)
    return [n for n in model.graph if n.domain == DOMAIN.domain and n.op_type in op_types]


def _unsupported(
    op: str, inputs: Sequence[Spec | None], attributes: Mapping[str, Any]
) -> str | None:
    specs = [spec for spec in inputs if spec is not None]
    if len(specs) < len(inputs):
        return "the graph does not tell the type or the shape of an input"
    return OPS[op].unsupported_reason(specs, attributes)


def _specs(node: ir.Node) -> list[Spec | None]:
    return [_spec(value) for value in node.inputs]


def _spec(value: ir.Value | None) -> Spec | None:
    if value is None or value.shape is None or value.dtype not in _TYPES:
        return None
    # A size without a name is like no other.
    shape = tuple(
        n if isinstance(n, int) else n.value or f"{value.name}:{axis}"
        for axis, n in enumerate(value.shape)
    )
    return Spec(_TYPES[value.dtype], shape)


def _plugin_node(node: ir.Node, kernel: PluginKernel) -> ir.Node:
    description, code = kernel.fields()
    return ir.Node(
        DOMAIN.domain,
        PLUGIN,
        node.inputs,
        [
            ir.AttrString(DESCRIPTION, description.decode()),
            ir.AttrTensor(CODE, ir.tensor(np.frombuffer(code, np.int8), name=CODE)),
        ],
        num_outputs=len(node.outputs),
        name=node.name,
    )


def _replace(old: ir.Node, new: Sequence[ir.Node]) -> None:
    """Replace a node by several, the last of which computes its outputs."""
    graph, outputs = old.graph, new[-1].outputs
    assert isinstance(graph, ir.Graph)
    for before, after in zip(old.outputs, outputs, strict=True):
        after.name, after.type, after.shape = before.name, before.type, before.shape
    ir.convenience.replace_nodes_and_values(graph, old, [old], new, old.outputs, outputs)


def _take_apart(model: ir.Model, functions: Mapping[str, OnnxFunction[..., Any]]) -> None:
    linear, gelu = _PARTS
    for node in _nodes(model, (_SPLIT,)):
        *layer, out_scale = node.inputs
        bias = layer[-1]
        product = ir.Node(DOMAIN.domain, linear, layer, num_outputs=1, name=f"{node.name}/{linear}")
        y = product.outputs[0]
        y.name, y.shape = f"{node.outputs[0].name}_product", node.outputs[0].shape
        y.type = bias.type if bias is not None else None
        attributes = node.attributes.values()
        last = ir.Node(DOMAIN.domain, gelu, [y, out_scale], attributes, name=f"{node.name}/{gelu}")
        _replace(node, [product, last])
        for name in _PARTS:
            body = ir.serde.deserialize_function(functions[name].to_function_proto())
            model.functions.setdefault(body.identifier(), body)


def _drop_unused(model: ir.Model) -> None:
    while True:
        graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
        called = {n.op_identifier() for graph in graphs for n in graph.all_nodes()}
        unused = [key for key in model.functions if key not in called]
        if not unused:
            return
        for key in unused:
            del model.functions[key]


def plugin_notes(plugins: Iterable[str], graphs: Sequence[Replaced]) -> list[str]:
    """Say of each plug-in how many nodes of some graphs it took, and why others were left.

    Blocks that share an engine are one graph.
    """
    notes = []
    for name in plugins:
        reasons: Counter[str] = Counter()
        for graph in graphs:
            reasons.update(graph.unsupported.get(name, {}))
        taken = sum(graph.plugins.get(name, 0) for graph in graphs)
        note = f"plug-in {name}: takes {taken} of {taken + reasons.total()} nodes"
        if reasons:
            details = "; ".join(f"{reason} ({count})" for reason, count in reasons.items())
            note += f", not those where {details}"
        notes.append(note)
    return notes
