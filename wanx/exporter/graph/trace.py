"""A component's ONNX graph, traced without its weights.

The module is built under ``FakeTensorMode``: tensors have shapes and dtypes but no storage, so the
14B takes no more memory than its graph. Every parameter leaves as an initialiser that has a name
and no data; :mod:`wanx.exporter.graph.attach` says where the data lies.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import Sequential
from onnx_ir.passes import common as passes
from torch._subclasses.fake_tensor import FakeTensorMode

from wanx.exporter.components import ComponentSpec, GraphInput, split_axis
from wanx.exporter.graph.repeat import TRACED_BLOCKS, repeat_block
from wanx.kernels.registry import ONNX_FUNCTIONS, OpsAsNodes

OPSET = 23


def trace(spec: ComponentSpec) -> ir.Model:
    """Trace ``spec`` to an ONNX model in fp32 whose initialisers have no data yet.

    Hot spots stay single nodes of the domain ``wanx``, with their bodies as model functions.
    Constants that the module computes for itself (tables, statistics) are real initialisers.
    """
    with torch.device("meta"):
        whole = spec.module()
    buffers = whole.named_buffers()
    constants = {name: buffer for name, buffer in buffers if buffer.device.type == "cpu"}
    parameters = {name for name, _ in whole.named_parameters()}
    traced_blocks = min(spec.blocks, TRACED_BLOCKS)
    with quiet_exporters(), FakeTensorMode():
        module = spec.module(traced_blocks).eval().requires_grad_(False)
        arguments: list[Any] = [item.example(spec.axes) for item in spec.inputs]
        axes: list[Any] = [_dynamic_axes(spec, item) for item in spec.inputs]
        if spec.caches:
            arguments.append([item.example(spec.axes) for item in spec.caches])
            axes.append([_dynamic_axes(spec, item) for item in spec.caches])
        with OpsAsNodes():
            program = torch.export.export(
                module, tuple(arguments), dynamic_shapes=tuple(axes), strict=False
            )
        exported = torch.onnx.export(
            program,
            tuple(arguments),
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            input_names=[item.name for item in (*spec.inputs, *spec.caches)],
            output_names=list(spec.outputs),
            verbose=False,
        )
    assert exported is not None
    model = exported.model
    if spec.blocks > traced_blocks:
        repeat_block(model.graph, spec.stack, spec.blocks)
    for name, value in model.graph.initializers.items():
        if name in constants:
            value.const_value = ir.tensor(constants[name].numpy(), name=name)
        elif name in parameters:
            value.const_value = None
    return _clean_up(model, spec)


def _dynamic_axes(spec: ComponentSpec, item: GraphInput) -> dict[int, object]:
    dims = {axis: torch.export.Dim(axis) for axis in spec.axes}
    axes: dict[int, object] = {}
    for i, size in enumerate(item.shape):
        if isinstance(size, str):
            factor, axis = split_axis(size)
            axes[i] = dims[axis] if factor == 1 else factor * dims[axis]
    return axes


def _clean_up(model: ir.Model, spec: ComponentSpec) -> ir.Model:
    used = {node.op_type for node in model.graph if node.domain == "wanx"}
    for name in sorted(used):
        function = ir.serde.deserialize_function(ONNX_FUNCTIONS[name].to_function_proto())
        model.functions[function.identifier()] = function
    model = Sequential(
        passes.RemoveUnusedNodesPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.ClearMetadataAndDocStringPass(),
    )(model).model
    for name in [n for n, v in model.graph.initializers.items() if not v.uses()]:
        del model.graph.initializers[name]
    # Intermediate shapes are the tracer's symbols; every runtime infers its own.
    for node in model.graph:
        node.name = None
        for output in node.outputs:
            if not output.is_graph_output():
                output.shape, output.type = None, None
    axes: dict[str, str] = {}
    for value, item in zip(model.graph.inputs, (*spec.inputs, *spec.caches), strict=True):
        assert value.shape is not None
        for old, new in zip(value.shape, item.shape, strict=True):
            if isinstance(new, str):
                factor, axis = split_axis(new)
                axes[str(old).removeprefix(f"{factor}*")] = axis
        value.shape = ir.Shape(item.shape)
    for value in model.graph.outputs:
        assert value.shape is not None
        value.shape = ir.Shape([_rename_axes(size, axes) for size in value.shape])
    model.graph.name = spec.name
    model.producer_name, model.producer_version = "wanx", None
    return model


def _rename_axes(size: int | ir.SymbolicDim, axes: dict[str, str]) -> int | str:
    """Express an output's size by the names of the input axes, as in ``8*h``."""
    if isinstance(size, int):
        return size
    return re.sub(r"\w+", lambda symbol: axes.get(symbol[0], symbol[0]), str(size))


@contextmanager
def quiet_exporters() -> Iterator[None]:
    """Silence the log messages and warnings of the exporters."""
    # Optional packages, deprecations, and errors that are raised as well: nothing to act on.
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
