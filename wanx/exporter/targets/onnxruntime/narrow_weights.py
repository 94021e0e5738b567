"""Products with weights of 16 bits, widened a piece at a time while it is in a core's cache.

ONNX Runtime's kernels for processors multiply in fp32. A ``Cast`` of a whole weight writes twice
its bytes to memory, and the product reads them again, which takes longer than the product itself
where it has few rows. Here a ``Scan`` goes through the weight, which stays a mapped file:

    yᵀ = concat(Cast(weight[i]) xᵀ for each piece i),    weight [pieces, rows, K], x [1, n, K]
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

PIECE = 1 << 20  # numbers: 4 MB of fp32, what the second caches of two cores hold
_NARROW = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)


def widen_piecewise(model: ir.Model) -> bool:
    """Rewrite the products of a graph with a weight of 16 bits behind a Cast, in place.

    Only weights of several pieces are rewritten, and products whose left operand is ``[1, n, K]``.

    Returns:
        Whether there were any.
    """
    changed = False
    for product in list(model.graph):
        if product.op_type == "MatMul" and (chain := _widened_weight(product)) is not None:
            changed |= _widen_one(model.graph, product, chain)
    return changed


def _widened_weight(product: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    """The Cast and the Transpose of a weight ``[N, K]`` that is the product's right operand."""
    right = product.inputs[1]
    transpose = None if right is None else right.producer()
    if transpose is None or transpose.op_type != "Transpose":
        return None
    turned = transpose.inputs[0]
    cast = None if turned is None else turned.producer()
    if cast is None or cast.op_type != "Cast":
        return None
    weight = cast.inputs[0]
    assert weight is not None
    is_narrow = weight.is_initializer() and weight.dtype in _NARROW and len(weight.uses()) == 1
    return (cast, transpose) if is_narrow else None


def _widen_one(graph: ir.Graph, product: ir.Node, chain: tuple[ir.Node, ir.Node]) -> bool:
    cast, transpose = chain
    weight, x, result = cast.inputs[0], product.inputs[0], product.outputs[0]
    assert weight is not None
    assert weight.name is not None
    assert isinstance(weight.const_value, ir.ExternalTensor)
    rows, columns = weight.const_value.shape.numpy()
    piece = _rows_of_a_piece(rows, columns)
    if piece == rows:
        return False
    shape = ir.Shape([rows // piece, piece, columns])
    stored = weight.const_value
    weight.const_value = ir.ExternalTensor(
        location=stored.location, offset=stored.offset, length=stored.length, dtype=stored.dtype,
        shape=shape, name=weight.name, base_dir=stored.base_dir,
    )  # fmt: skip
    weight.shape = shape
    name = weight.name
    squeeze = ir.node("Squeeze", [x, _constant(graph, product, f"{name}.first", 0)])
    x_columns = ir.node("Transpose", [squeeze.outputs[0]], {"perm": [1, 0]})
    scan = ir.node(
        "Scan",
        [weight],
        {"body": _body(x_columns.outputs[0], stored.dtype, piece, columns), "num_scan_inputs": 1},
    )
    joined = ir.node(
        "Reshape", [scan.outputs[0], _constant(graph, product, f"{name}.sizes", rows, -1)]
    )
    turned = ir.node("Transpose", [joined.outputs[0]], {"perm": [1, 0]})
    y = ir.node("Unsqueeze", [turned.outputs[0], _constant(graph, product, f"{name}.axis", 0)])
    for node in (squeeze, x_columns, scan, joined, turned, y):
        node.outputs[0].name = f"{weight.name}.{node.op_type.lower()}_{len(node.inputs)}"
        graph.insert_before(product, node)
    x_columns.outputs[0].name = f"{weight.name}.columns"
    y.outputs[0].type, y.outputs[0].shape = result.type, result.shape
    y.outputs[0].name, result.name = result.name, f"{result.name}.whole"
    result.replace_all_uses_with(y.outputs[0], replace_graph_outputs=True)
    graph.remove([product, transpose, cast], safe=True)
    return True


def _rows_of_a_piece(rows: int, columns: int) -> int:
    """The largest divisor of ``rows`` whose rows fit a piece."""
    return max(
        count
        for count in range(1, rows + 1)
        if rows % count == 0 and (count == 1 or count * columns <= PIECE)
    )


def _constant(graph: ir.Graph, before: ir.Node, name: str, *numbers: int) -> ir.Value:
    node = ir.node("Constant", [], {"value": ir.tensor(np.array(numbers, np.int64))})
    node.outputs[0].name = name
    graph.insert_before(before, node)
    return node.outputs[0]


def _body(x_columns: ir.Value, stored: ir.DataType, rows: int, columns: int) -> ir.Graph:
    narrow = ir.Value(name="narrow", shape=ir.Shape([rows, columns]), type=ir.TensorType(stored))
    cast = ir.node("Cast", [narrow], {"to": ir.DataType.FLOAT})
    product = ir.node("MatMul", [cast.outputs[0], x_columns])
    cast.outputs[0].name, product.outputs[0].name = "wide", "product"
    product.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    product.outputs[0].shape = ir.Shape([rows, None])
    return ir.Graph([narrow], [product.outputs[0]], nodes=[cast, product], name="piece")
