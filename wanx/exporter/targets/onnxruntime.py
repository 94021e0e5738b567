"""The ``cpu`` target: ONNX Runtime on the processor.

The portable graph runs there as it is. Three bodies are replaced:

- ``Attention``, because ONNX's holds all L×L scores at once in ONNX Runtime (51 GB for 81 frames at
  480P), where its own ``MultiHeadAttention`` works block by block.
- ``QuantLinear`` in int8, by the product that MLAS runs on VNNI: of unsigned activations with
  signed weights. ONNX Runtime finds it by itself only where a single layer reads the input.
- ``WeightOnlyLinear``, by the product of integers, with the mapped weight as its first operand: see
  :func:`WeightOnlyLinear`. ONNX Runtime would keep a packed copy of the weight, or widen it.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import opset23 as op
from onnxscript import script

from wanx.config.number_formats import UINT8
from wanx.kernels.registry import DOMAIN
from wanx.exporter.components import ComponentSpec

ENGINE = "onnxruntime-cpu"
# Products, by what multiplies: whatever else a forward runs says nothing about its precision.
PRODUCTS = (
    *("MatMul", "FusedMatMul", "Gemm", "FusedGemm", "MultiHeadAttention", "Attention"),
    *("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm"),
    "MatMulNBits",
)
INTEGER_PRODUCT = "MatMulIntegerToFloat"


def optimize_for_ort(model: ir.Model) -> bool:
    """Swap the bodies of functions in place; return whether the model has any of them."""
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
    body = ir.serde.deserialize_function(WeightOnlyLinear.to_function_proto())
    model.functions[function.identifier()] = body
    return True


TINY = 2.0**-126
STEPS = 64  # of one of the two digits of an activation, to each side of zero


@script(DOMAIN, default_opset=op)
def WeightOnlyLinear(x, weight8, weight_scale):  # type: ignore[no-untyped-def] # noqa: D103
    # q = high · 128 + low, with |high|, |low| <= 64.
    step = op.ReduceMax(op.Abs(x), op.Constant(value_ints=[-1]), keepdims=1)
    step = op.Max(step * op.Constant(value_float=1 / (128 * STEPS - 1)), op.Constant(value_float=TINY))
    q = op.Round(x / step)
    high = op.Round(q * op.Constant(value_float=1 / 128))
    low = q - high * op.Constant(value_float=128.0)
    rows = op.Concat(high, low, axis=1)
    columns = op.Transpose(op.Squeeze(op.Cast(rows, to=3), [0]), perm=[1, 0])
    sums = op.MatMulInteger(weight8, columns, op.Cast(op.Constant(value_int=128), to=2))
    of_high, of_low = op.Split(op.Cast(sums, to=1), axis=1, num_outputs=2)
    y = op.Transpose(of_high * op.Constant(value_float=128.0) + of_low, perm=[1, 0])
    return op.Unsqueeze(y * weight_scale, [0]) * step


def profile_products(spec: ComponentSpec, graph: Path, root: Path) -> dict[str, int]:
    """Run a graph once on zeros, and count the products that it ran by operator.

    Weights stay mapped files: nothing is packed or folded, so that a 14B needs no memory of its
    own.

    Args:
        spec: names inputs and sizes; the smallest sizes are used.
        graph: the ONNX file.
        root: the folder that its locations of weights are relative to.
    """
    import onnxruntime

    from wanx.runtime.sessions.onnxruntime import session_options

    axes = dict.fromkeys(spec.axes, 16)
    feeds = {item.name: item.example(axes).numpy() for item in (*spec.inputs, *spec.caches)}
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(root)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        options.add_session_config_entry("session.disable_prepacking", "1")
        session = onnxruntime.InferenceSession(
            graph.read_bytes(),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["ConstantFolding"],
        )
        session.run(None, feeds)
        return _products(json.loads(Path(session.end_profiling()).read_bytes()))


def _products(events: list[Mapping[str, Any]]) -> dict[str, int]:
    names = (
        event["args"]["op_name"]
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    )
    return dict(sorted(Counter(name for name in names if name in PRODUCTS).items()))
