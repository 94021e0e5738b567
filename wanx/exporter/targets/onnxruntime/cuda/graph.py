"""The ``cuda`` target: graphs that compute in the 16 bits their weights are stored in.

Networks are traced in that type, with norms, modulation and residuals in fp32 as everywhere, so no
weight passes through a Cast. The VAE computes in fp32, as the reference runs it. Where weights are
in 8 bits, the type around them is bf16. Attention is ONNX Runtime's own fused one, and a layer with
an 8-bit weight alone its ``MatMulNBits``, which reads the weight as it is stored.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from wanx.bundle.manifest import Component, Manifest
from wanx.config.number_formats import UINT8
from wanx.errors import WanxError
from wanx.exporter.graph.attach import attach_weights
from wanx.exporter.graph.cache import GraphCache
from wanx.exporter.quantization.recipe import recipe_from_manifest
from wanx.exporter.targets.onnxruntime.cuda.forms import BODIES
from wanx.exporter.trace_component import trace_component
from wanx.files.safetensors import TensorRef, read_header
from wanx.kernels.number_formats import FORMATS

# Columns of a weight that share a scale in MatMulNBits; here all scales of a row are equal.
BLOCKS = (128, 64, 32, 16)


def cuda_graph(
    root: Path,
    manifest: Manifest,
    component: str,
    dtype: torch.dtype | None = None,
    cache: GraphCache | None = None,
) -> ir.Model:
    """Trace a component of a bundle for CUDA, on the bundle's own weights.

    Args:
        root: of the bundle.
        manifest: of the bundle.
        component: such as ``dit``.
        dtype: that it computes in; None takes :func:`compute_dtype`.
        cache: of graphs; None is the user's.

    Raises:
        WanxError: 8-bit weights are not stored as this version stores them.
    """
    record = manifest.components[component]
    dtype = dtype or compute_dtype(component, record)
    tensors: dict[str, TensorRef] = {}
    for file in record.weights:
        tensors |= read_header(root / file).entries
    recipe = None
    if record.quantization is not None:
        shapes = {name: ref.shape for name, ref in tensors.items()}
        recipe = recipe_from_manifest(record.quantization, shapes)
    model = (cache or GraphCache()).graph(
        component, manifest.config, recipe,
        lambda: trace_component(component, manifest.config, recipe, dtype),
        computes=FORMATS[dtype].name,
    )  # fmt: skip
    for name, value in model.graph.initializers.items():
        # As exports of earlier versions had them, with the same name of their scheme.
        if value.dtype == ir.DataType.UINT8 and tensors[name].dtype != UINT8.safetensors:
            raise WanxError(
                f"{name!r} of {component} is stored as {tensors[name].dtype} instead of "
                f"{UINT8.safetensors}; export the bundle again"
            )
    attach_weights(model, tensors, root)
    optimize_for_cuda(model)
    return model


def compute_dtype(component: str, record: Component) -> torch.dtype:
    """Type that a component computes in: that of most of its weights, bf16 around 8-bit ones."""
    if component.startswith("vae_"):
        return torch.float32
    if record.quantization is not None:
        return torch.bfloat16
    wide = (torch.float32, torch.bfloat16, torch.float16)
    return max(wide, key=lambda dtype: record.storage.get(FORMATS[dtype].safetensors, 0))


def optimize_for_cuda(model: ir.Model) -> None:
    """Rewrite a graph for ONNX Runtime's CUDA kernels, in place."""
    for node in list(model.graph):
        if node.op_type == "WeightOnlyLinear":
            _multiply_as_stored(model.graph, node)
        elif node.op_type == "QuantizeLinear":  # of an activation, which stays as it is
            x = node.inputs[0]
            assert x is not None
            node.outputs[0].replace_all_uses_with(x)
            model.graph.remove(node, safe=True)
    for name, function in BODIES.items():
        if ("wanx", name, "") in model.functions:
            body = ir.serde.deserialize_function(function.to_function_proto())
            model.functions[body.identifier()] = body
    model.opset_imports["com.microsoft"] = 1
    for index, output in enumerate(model.graph.outputs):
        if output.dtype != ir.DataType.FLOAT:  # as the runtime reads it
            cast = ir.node("Cast", [output], {"to": ir.DataType.FLOAT})
            wide, label = cast.outputs[0], output.name
            wide.shape, wide.type = output.shape, ir.TensorType(ir.DataType.FLOAT)
            output.name, wide.name = f"{label}.narrow", label
            model.graph.append(cast)
            model.graph.outputs[index] = wide


def _multiply_as_stored(graph: ir.Graph, node: ir.Node) -> None:
    """Make a MatMulNBits of a layer, where its columns are whole blocks."""
    x, weight, scale = node.inputs
    assert x is not None
    assert weight is not None
    assert scale is not None
    assert isinstance(weight.const_value, ir.ExternalTensor)
    rows, columns = weight.const_value.shape.numpy()
    block = next((size for size in BLOCKS if columns % size == 0), None)
    if block is None:
        return
    stored = weight.const_value
    shape = ir.Shape([rows, columns // block, block])
    weight.const_value = ir.ExternalTensor(
        location=stored.location, offset=stored.offset, length=stored.length, dtype=stored.dtype,
        shape=shape, name=weight.name or "", base_dir=stored.base_dir,
    )  # fmt: skip
    weight.shape = shape
    sizes = ir.node("Constant", [], {"value": ir.tensor(np.array([rows, columns // block]))})
    axis = ir.node("Constant", [], {"value": ir.tensor(np.array([1]))})
    column = ir.node("Unsqueeze", [scale, axis.outputs[0]])
    blocks = ir.node("Expand", [column.outputs[0], sizes.outputs[0]])
    typed = ir.node("CastLike", [blocks.outputs[0], x])
    product = ir.node(
        "MatMulNBits",
        [x, weight, typed.outputs[0]],
        {"K": columns, "N": rows, "bits": 8, "block_size": block},
        domain="com.microsoft",
    )
    for number, new in enumerate((sizes, axis, column, blocks, typed, product)):
        new.outputs[0].name = f"{weight.name}.nbits_{number}"
        graph.insert_before(node, new)
    node.outputs[0].replace_all_uses_with(product.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)
