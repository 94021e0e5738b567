"""A deep stack of equal blocks from the trace of two: tracing costs seconds, copying nothing."""

from __future__ import annotations

import onnx_ir as ir

TRACED_BLOCKS = 2
_SCOPES = "pkg.torch.onnx.name_scopes"


def repeat_block(graph: ir.Graph, stack: str, count: int) -> None:
    """Copy the second block of ``stack`` until there are ``count``, in place.

    The first block may define constants that the second one shares with it; the second is like
    all that follow. A copy reads what its original reads, but the weights of its own block, and in
    place of the first block's result that of the block before it.

    Args:
        graph: as the exporter left it, with the module of each node in its metadata, traced from
            a network with ``TRACED_BLOCKS`` blocks.
        stack: name of the module list, such as ``blocks``.
        count: how many blocks the network has.
    """
    first, template = (_nodes_in_module(graph, f"{stack}.{i}") for i in range(TRACED_BLOCKS))
    (block_input,) = {
        value
        for node in template
        for value in node.inputs
        if value is not None and value.producer() in first and not _is_constant(value)
    }
    (block_output,) = (
        output
        for node in template
        for output in node.outputs
        if output.is_graph_output() or any(user not in template for user, _ in output.uses())
    )
    later_uses = [use for use in block_output.uses() if use[0] not in template]
    previous_output, last = block_output, list(template)[-1]
    for block in range(TRACED_BLOCKS, count):
        copies: dict[ir.Value | None, ir.Value] = {block_input: previous_output}
        for node in template:
            for value in node.inputs:
                if value is not None and value.is_initializer() and value not in copies:
                    copies[value] = _weight_of_block(graph, value, stack, block)
            copy = ir.Node(
                node.domain,
                node.op_type,
                [copies.get(value, value) for value in node.inputs],
                node.attributes.values(),
                outputs=[
                    ir.Value(name=f"{output.name}.{block}", shape=output.shape, type=output.type)
                    for output in node.outputs
                ],
            )
            copies |= zip(node.outputs, copy.outputs, strict=True)
            graph.insert_after(last, copy)
            last = copy
        previous_output = copies[block_output]
    for user, index in later_uses:
        user.replace_input_with(index, previous_output)
    for index, output in enumerate(graph.outputs):
        if output is block_output:
            graph.outputs[index] = previous_output
            block_output.name, previous_output.name = previous_output.name, block_output.name


def _nodes_in_module(graph: ir.Graph, module: str) -> dict[ir.Node, None]:
    # The metadata holds a Python list, so a name stands between quotes.
    return {node: None for node in graph if f"'{module}'" in node.metadata_props.get(_SCOPES, "")}


def _is_constant(value: ir.Value) -> bool:
    """True if a value depends on no input and no weight."""
    node = value.producer()
    return node is not None and all(item is None or _is_constant(item) for item in node.inputs)


def _weight_of_block(graph: ir.Graph, value: ir.Value, stack: str, block: int) -> ir.Value:
    traced = f"{stack}.{TRACED_BLOCKS - 1}."
    assert value.name is not None
    if not value.name.startswith(traced):
        return value
    name = f"{stack}.{block}.{value.name.removeprefix(traced)}"
    if name not in graph.initializers:
        weight = ir.Value(name=name, shape=value.shape, type=value.type)
        weight.const_value = value.const_value
        graph.initializers[name] = weight
    return graph.initializers[name]
