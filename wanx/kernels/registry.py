"""The seam between PyTorch and ONNX: which ONNX function stands for which ``wanx::`` op.

An op called in a model becomes one node in the domain ``wanx``. The function registered here is its
body in standard ONNX, so that every runtime can execute the graph; a target with a faster
implementation drops the body and takes the name.

Ops have no backward: when an input requires a gradient, the public functions of this package run
the differentiable reference instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import OnnxFunction
from onnxscript.values import Opset
from torch import Tensor
from torch.overrides import TorchFunctionMode

from wanx.kernels.number_formats import FORMATS

DOMAIN = Opset("wanx", 1)
ONNX_TYPES = {dtype: row.onnx for dtype, row in FORMATS.items() if row.onnx}
ONNX_FUNCTIONS: dict[str, OnnxFunction[..., Any]] = {}
NODES: dict[Callable[..., Any], Callable[..., Any]] = {}
Outputs = Sequence[tuple[torch.dtype, Sequence[int | torch.SymInt]]]


def needs_gradient(*tensors: Tensor | None) -> bool:
    """True if the differentiable reference has to run instead of the op."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def register(
    overload: torch._ops.OpOverload,
    function: OnnxFunction[..., Any],
    outputs: Callable[..., Outputs] | None = None,
) -> None:
    """Export the torch op ``overload`` as a node with the ONNX ``function`` as its body.

    The function's inputs are the op's tensors and its attributes the op's other arguments, by the
    same names; a dtype becomes the number that ONNX has for it. Each output of the op has the shape
    and dtype of the input at the same position, unless ``outputs`` says otherwise: it takes the
    op's arguments and gives the dtype and shape of each output.
    """
    arguments = overload._schema.arguments
    count = len(overload._schema.returns)

    def to_onnx_node(*values: Any) -> Tensor | tuple[Tensor, ...]:
        named = list(zip(arguments, values, strict=True))
        inputs = [value for _, value in named if isinstance(value, Tensor)]
        attributes = {a.name: value for a, value in named if not isinstance(value, Tensor)}
        attributes = {n: ONNX_TYPES.get(value, value) for n, value in attributes.items()}
        like = outputs(*values) if outputs else [(t.dtype, t.shape) for t in inputs[:count]]
        nodes = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN.domain}::{function.name}",
            inputs,
            attributes,
            dtypes=[dtype for dtype, _ in like],
            shapes=[shape for _, shape in like],
            version=DOMAIN.version,
        )
        return nodes[0] if count == 1 else tuple(nodes)

    ONNX_FUNCTIONS[function.name] = function
    register_node(overload, to_onnx_node)


def register_node(overload: torch._ops.OpOverload, to_onnx_node: Callable[..., Any]) -> None:
    """Export the torch op ``overload`` as the node that ``to_onnx_node`` emits.

    For an op that is one node of standard ONNX, which runtimes look for by that name.
    """
    NODES[overload] = to_onnx_node


class OpsAsNodes(TorchFunctionMode):
    """Mode in which every registered op is traced as its ONNX node.

    Decomposing the ops afterwards has the same result, and traces the whole program again.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call ``func``, or what emits its node."""
        return NODES.get(func, func)(*args, **(kwargs or {}))
