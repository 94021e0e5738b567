"""The ``cpu`` target: ONNX Runtime on the processor.

The portable graph runs there as it is. Three bodies of functions are replaced:

- ``Attention``, because ONNX's holds all L×L scores at once in ONNX Runtime (51 GB for 81 frames at
  480P), where its own ``MultiHeadAttention`` works block by block.
- ``QuantLinear`` in int8, by the product that MLAS runs on VNNI: of unsigned activations with
  signed weights. ONNX Runtime finds it by itself only where a single layer reads the input.
- ``WeightOnlyLinear``, by a product of integers that reads the weight as it is stored
  (``forms.py``). ONNX Runtime would widen it for each product, or keep a packed copy.

Weights of 16 bits that multiply few rows are widened a piece at a time (``narrow_weights.py``).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from wanx.exporter.targets.onnxruntime.narrow_weights import widen_piecewise

ENGINE = "onnxruntime-cpu"
INTEGER_PRODUCT = "MatMulIntegerToFloat"


def optimize_for_ort(model: ir.Model, *, few_rows: bool = False) -> bool:
    """Rewrite a graph for ONNX Runtime's processor kernels, in place.

    Args:
        model: its weights attached.
        few_rows: products have few rows, so that reading weights takes longer than multiplying.

    Returns:
        Whether anything changed.
    """
    swaps = {
        "Attention": _block_by_block,
        "QuantLinear": _uint8_activations,
        "WeightOnlyLinear": _integer_product,
    }
    changed = [
        swap(model, function)
        for name, swap in swaps.items()
        if (function := model.functions.get(("wanx", name, ""))) is not None
    ]
    if few_rows:
        changed.append(widen_piecewise(model))
    return any(changed)


def _block_by_block(model: ir.Model, function: ir.Function) -> bool:
    (attention,) = (node for node in function if node.op_type == "Attention")
    attention.domain, attention.op_type = "com.microsoft", "MultiHeadAttention"
    for name in ("q_num_heads", "kv_num_heads"):
        del attention.attributes[name]
    attention.attributes["num_heads"] = ir.RefAttr("num_heads", "num_heads", ir.AttributeType.INT)
    _import_microsoft(model, function)
    return True


def _import_microsoft(model: ir.Model, function: ir.Function) -> None:
    function.opset_imports["com.microsoft"] = 1
    model.opset_imports["com.microsoft"] = 1


def _uint8_activations(model: ir.Model, function: ir.Function) -> bool:
    """Shift int8 activations by 128 to uint8, and fuse product and bias into one operator."""
    quantizers = [
        node
        for node in model.graph
        if node.op_type == "QuantizeLinear"
        and node.attributes["output_dtype"].as_int() == ir.DataType.INT8
    ]
    if not quantizers:
        return False
    zero = ir.Value(name="unsigned_zero", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.UINT8))
    zero.const_value = ir.tensor(np.uint8(128), name=zero.name)
    model.graph.initializers["unsigned_zero"] = zero
    for node in quantizers:
        node.resize_inputs(3)
        node.replace_input_with(2, zero)
        node.attributes["output_dtype"] = ir.AttrInt64("output_dtype", ir.DataType.UINT8)
    x8, x_scale, weight8, weight_scale, bias = function.inputs
    offset = ir.node("Constant", [], {"value": ir.tensor(np.uint8(128))})
    turned = ir.node("Transpose", [weight8], {"perm": [1, 0]})
    operands = [x8, turned.outputs[0], x_scale, weight_scale, offset.outputs[0], None, bias]
    product = ir.node(INTEGER_PRODUCT, operands, domain="com.microsoft")
    before = list(function)
    function.outputs[0] = product.outputs[0]
    function.remove(before)
    function.extend([offset, turned, product])
    for number, node in enumerate(function):
        node.outputs[0].name = f"value_{number}"
    _import_microsoft(model, function)
    return True


def _integer_product(model: ir.Model, function: ir.Function) -> bool:
    from wanx.exporter.targets.onnxruntime.forms import WeightOnlyLinear

    body = ir.serde.deserialize_function(WeightOnlyLinear.to_function_proto())
    model.functions[function.identifier()] = body
    return True
