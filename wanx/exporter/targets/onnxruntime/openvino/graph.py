"""The ``openvino`` target: graphs of operators that OpenVINO's plug-in for ONNX Runtime takes.

It reads neither the newer operators of ONNX (``RMSNormalization``, ``RotaryEmbedding``,
``Attention``) nor all contributed ones of ONNX Runtime. Nodes that it leaves run on the processor's
own provider, one program of OpenVINO between each two of them. So they become older operators.
Layers in int8 keep QuantizeLinear and DequantizeLinear around their products, which OpenVINO fuses;
weights of 8 bits alone are widened in the way that it does while it multiplies.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnxscript import OnnxFunction

from wanx.bundle.manifest import Manifest
from wanx.exporter.targets.onnxruntime.openvino.forms import (
    PlainAttention,
    PlainRMSNormalization,
    PlainRotaryEmbedding,
    WeightOnlyLinear,
)

_PLAIN: dict[str, OnnxFunction[..., Any]] = {
    "RMSNormalization": PlainRMSNormalization,
    "RotaryEmbedding": PlainRotaryEmbedding,
    "Attention": PlainAttention,
}


def openvino_graph(root: Path, manifest: Manifest, component: str) -> ir.Model:
    """Rewrite the portable graph of a component of a bundle for OpenVINO."""
    model = ir.load(root / manifest.components[component].graph)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value.base_dir = root
    optimize_for_openvino(model)
    return model


def optimize_for_openvino(model: ir.Model) -> None:
    """Rewrite a portable graph for OpenVINO, in place."""
    if ("wanx", "WeightOnlyLinear", "") in model.functions:
        _add(model, WeightOnlyLinear)
    bodies: list[ir.Function | ir.Graph] = [*model.functions.values(), model.graph]
    for node in [node for body in bodies for node in body]:
        # Without a bias, ONNX Runtime's own fused attention stands for it.
        if node.domain == "" and node.op_type == "Attention" and len(node.inputs) == 3:
            _multi_head_attention(node)
        elif node.domain == "" and node.op_type in _PLAIN:
            plain = _PLAIN[node.op_type]
            node.domain, node.op_type = "wanx", plain.name
            _add(model, plain)
    for body in bodies:
        body.opset_imports.setdefault("com.microsoft", 1)
        body.opset_imports.setdefault("wanx", 1)
    model.opset_imports["com.microsoft"] = 1


def _add(model: ir.Model, function: OnnxFunction[..., Any]) -> None:
    body = ir.serde.deserialize_function(function.to_function_proto())
    model.functions[body.identifier()] = body


def _multi_head_attention(node: ir.Node) -> None:
    heads = node.attributes.pop("q_num_heads")
    del node.attributes["kv_num_heads"]
    node.domain, node.op_type = "com.microsoft", "MultiHeadAttention"
    if heads.is_ref():
        node.attributes["num_heads"] = ir.RefAttr(
            "num_heads", heads.ref_attr_name or "", ir.AttributeType.INT
        )
    else:
        node.attributes["num_heads"] = ir.AttrInt64("num_heads", heads.as_int())
