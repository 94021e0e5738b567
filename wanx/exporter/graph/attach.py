"""Point a traced graph's initialisers at the bytes of the bundle's weight files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from wanx.config.number_formats import WEIGHTS
from wanx.errors import WanxError, abbreviate
from wanx.files.safetensors import TensorRef

IR_TYPES = {row.safetensors: ir.DataType(row.onnx) for row in WEIGHTS}


def attach_weights(model: ir.Model, tensors: Mapping[str, TensorRef], root: Path) -> dict[str, int]:
    """Point every initialiser without data at its bytes in a safetensors file, in place.

    A tensor stored in a narrower type than the graph computes in passes through a Cast, so the
    same file serves graphs of any precision. Locations are relative to ``root``, the bundle:
    ONNX tools refuse the ``..`` that a path relative to the graph would need.

    Returns:
        How many tensors of each stored type the graph reads.

    Raises:
        WanxError: the files lack a tensor.
    """
    counts: dict[str, int] = {}
    without_data = {n: v for n, v in model.graph.initializers.items() if v.const_value is None}
    if missing := [name for name in without_data if name not in tensors]:
        raise WanxError(
            f"{model.graph.name} reads tensors that were not written: {abbreviate(missing)}; this "
            "is a fault of wanx, please report it"
        )
    for name, value in without_data.items():
        ref = tensors[name]
        stored = IR_TYPES[ref.dtype]
        graph_type, shape = value.dtype, value.shape
        assert graph_type is not None
        assert shape is not None
        value.const_value = ir.ExternalTensor(
            location=ref.file.relative_to(root).as_posix(),
            offset=ref.offset,
            length=ref.nbytes,
            dtype=stored,
            shape=shape,
            name=name,
            base_dir=root,
        )
        # Not ``value.dtype =``, which would change every value that shares the type object.
        value.type = ir.TensorType(stored)
        if stored != graph_type:
            _cast_uses(model.graph, value, graph_type)
        counts[ref.dtype] = counts.get(ref.dtype, 0) + 1
    return counts


def _cast_uses(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> None:
    for number, (user, index) in enumerate(value.uses()):
        if user.op_type == "Gather" and index == 0:
            # Cast the gathered rows, not the table: umT5's has 256,384 of them.
            output = user.outputs[0]
            cast = ir.node("Cast", [output], {"to": dtype.value})
            for consumer, input_index in output.uses():
                if consumer is not cast:
                    consumer.replace_input_with(input_index, cast.outputs[0])
            cast.outputs[0].name = f"{output.name}.cast"
            graph.insert_after(user, cast)
        else:
            cast = ir.node("Cast", [value], {"to": dtype.value})
            cast.outputs[0].name = f"{value.name}.cast{number or ''}"
            user.replace_input_with(index, cast.outputs[0])
            graph.insert_before(user, cast)
