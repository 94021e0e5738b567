"""The ``cpu`` target: ONNX Runtime on the processor.

The portable graph runs there as it is. One body is replaced: ONNX's ``Attention`` holds all L×L
scores at once in ONNX Runtime (51 GB for 81 frames at 480P), its own ``MultiHeadAttention`` works
block by block.
"""

from __future__ import annotations

import onnx_ir as ir

ENGINE = "onnxruntime-cpu"


def specialise(model: ir.Model) -> bool:
    """Swap the body of ``wanx::Attention`` in place; return whether the model has one."""
    function = model.functions.get(("wanx", "Attention", ""))
    if function is None:
        return False
    (attention,) = (node for node in function if node.op_type == "Attention")
    attention.domain, attention.op_type = "com.microsoft", "MultiHeadAttention"
    for name in ("q_num_heads", "kv_num_heads"):
        del attention.attributes[name]
    attention.attributes["num_heads"] = ir.RefAttr("num_heads", "num_heads", ir.AttributeType.INT)
    function.opset_imports["com.microsoft"] = 1
    model.opset_imports["com.microsoft"] = 1
    return True
