"""Bytes of a traced graph whose weights are not attached yet, and back."""

from __future__ import annotations

import onnx
import onnx_ir as ir

_UNATTACHED = "unattached"  # location of a tensor without data


def graph_to_bytes(model: ir.Model) -> bytes:
    """Serialise a model from :func:`wanx.exporter.graph.trace.trace`; it stays as it is."""
    without_data = [v for v in model.graph.initializers.values() if v.const_value is None]
    try:
        for value in without_data:
            assert value.dtype is not None
            assert value.shape is not None
            value.const_value = ir.ExternalTensor(
                location=_UNATTACHED, offset=None, length=None, dtype=value.dtype,
                shape=value.shape, name=value.name or "",
            )  # fmt: skip
        data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
        return data
    finally:
        for value in without_data:
            value.const_value = None


def graph_from_bytes(data: bytes) -> ir.Model:
    """The inverse of :func:`graph_to_bytes`."""
    model: ir.Model = ir.from_proto(onnx.ModelProto.FromString(data))
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and tensor.location == _UNATTACHED:
            value.const_value = None
    return model
