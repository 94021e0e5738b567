"""Table of the kernels of ONNX Runtime's CUDA provider, ``kernel_table.json``, and who has one.

A row unites kernels that differ in types only, so that which types go together is not in it; nor
are shapes.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

Kernels = Mapping[str, Mapping[str, Mapping[str, Mapping[str, str]]]]
TABLE: Mapping[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_bytes())


@dataclass(frozen=True, kw_only=True)
class MissingKernel:
    """Nodes for which there is no kernel, all for the same reason.

    Attributes:
        op_type: of the nodes.
        domain: of the nodes; ai.onnx is empty.
        since_version: opset that the graph's version of the operator is from.
        constraint: type constraint that no kernel meets; empty where that version has no kernel.
        found: type that the nodes have there.
        supported: types that kernels have there.
        count: how many nodes.
    """

    op_type: str
    domain: str = ""
    since_version: int
    constraint: str = ""
    found: str = ""
    supported: tuple[str, ...] = ()
    count: int = 1

    def __str__(self) -> str:
        name = f"{self.count} × {self.domain or 'ai.onnx'}.{self.op_type}-{self.since_version}"
        if not self.constraint:
            return f"{name}: no kernel"
        supported = ", ".join(self.supported)
        return f"{name}: {self.constraint} is {self.found}, and kernels take {supported}"


@dataclass(frozen=True, kw_only=True)
class Signature:
    """Version of an operator, and (name, type constraint or type) of its inputs and outputs."""

    since_version: int
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]


def has_schema(node: ir.Node) -> bool:
    """True for an operator of ONNX itself."""
    return not node.domain and onnx.defs.has(node.op_type)


def schema_of(op_type: str, opset: int) -> Any:  # whose stub lacks what is about functions
    """ONNX's description of an operator as a version of its operators has it."""
    return onnx.defs.get_schema(op_type, opset, "")


@functools.cache
def signature_of(domain: str, op_type: str, opset: int) -> Signature:
    """Signature of an operator, ONNX's own or one of ONNX Runtime's table."""
    if not domain and onnx.defs.has(op_type):
        schema = schema_of(op_type, opset)
        return Signature(
            since_version=schema.since_version,
            inputs=tuple((formal.name, formal.type_str) for formal in schema.inputs),
            outputs=tuple((formal.name, formal.type_str) for formal in schema.outputs),
        )
    inputs, outputs = (
        tuple(
            (name, constraint) for name, _, constraint in (f.partition(":") for f in side.split())
        )
        for side in TABLE["signatures"].get(domain, {}).get(op_type, ("", ""))
    )
    return Signature(since_version=1, inputs=inputs, outputs=outputs)


def missing_kernel(kernels: Kernels, node: ir.Node, opset: int) -> MissingKernel | None:
    """Reason why no kernel takes a node: KernelRegistry, core/framework/kernel_registry.cc."""
    signature = signature_of(node.domain, node.op_type, opset)
    reason = MissingKernel(
        op_type=node.op_type, domain=node.domain, since_version=signature.since_version
    )
    for versions, constraints in kernels.get(node.domain, {}).get(node.op_type, {}).items():
        if not covers(versions, signature.since_version):
            continue
        for constraint, types in constraints.items():
            found = _type_at(node, signature, constraint)
            supported = tuple(types.split())
            if found is not None and found not in supported:
                reason = replace(reason, constraint=constraint, found=found, supported=supported)
                break
        else:
            return None
    return reason


def covers(versions: str, since_version: int) -> bool:
    """True if a kernel for ``13+``, ``13`` or ``7-12`` takes an operator of that version.

    ``13+`` takes no later one: a kernel without an end was written before a later version was.
    """
    first, _, last = versions.removesuffix("+").partition("-")
    return int(first) <= since_version <= int(last or first)


def _type_at(node: ir.Node, signature: Signature, constraint: str) -> str | None:
    """The type that a constraint is about: of the first argument that is there, and of no other.

    The constraint may also be the name of an argument. None: no such argument is there.
    """
    for formals, values in ((signature.inputs, node.inputs), (signature.outputs, node.outputs)):
        for formal, value in zip(formals, values, strict=False):
            if constraint in formal and value is not None and value.name:
                return value.dtype.name.lower() if value.dtype else "unknown"
    return None
