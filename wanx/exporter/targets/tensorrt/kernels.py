"""Triton kernels for TensorRT plans: compiled for each GPU, with a description of the launch.

The launch is not written down a second time: the function that launches the kernel runs once for
each GPU, on tensors with symbolic sizes and without memory, and what it asks for is captured.
"""

from __future__ import annotations

import string
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import SymInt, Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from wanx.bundle.plugin_kernel import (
    Argument,
    Description,
    Expression,
    Integer,
    PluginKernel,
    Pointer,
    Real,
    Token,
    Value,
    Variant,
)
from wanx.errors import EnvironmentMismatchError, WanxError
from wanx.exporter.targets.tensorrt.ops import OPS, Spec
from wanx.kernels.aot_compile import compile_for, record
from wanx.kernels.launch import capture_launches, launch
from wanx.kernels.number_formats import FORMATS

ELEMENTS = {dtype: row.name for dtype, row in FORMATS.items() if row.triton}
_ALIGNED = 16
_LIKELY = 1013  # stands for a size that is not known


def compile_plugin_kernel(
    op: str, inputs: Sequence[Spec], attributes: Mapping[str, Any], sms: Sequence[int]
) -> PluginKernel:
    """Compile and describe the kernel of a node.

    Args:
        op: the node's type, one of :data:`OPS`.
        inputs: the node's.
        attributes: the node's.
        sms: GPUs, such as 89.

    Raises:
        EnvironmentMismatchError: a GPU lacks a number format of the kernel.
        WanxError: the kernel does not compile, or needs what a plan does not carry.
    """
    captures = [LaunchCapture(op, inputs, attributes, sm) for sm in sms]
    compiled = [capture.compiled() for capture in captures]
    description = Description(
        op=op,
        inputs=captures[0].inputs,
        outputs=captures[0].outputs,
        variants=tuple(variant for variant, _ in compiled),
    )
    return PluginKernel(description=description, code=b"".join(code for _, code in compiled))


class LaunchCapture:
    """The one launch of a node on a GPU.

    Attributes:
        inputs: of the node, as a plan describes them.
        outputs: the same.
    """

    def __init__(
        self, op: str, inputs: Sequence[Spec], attributes: Mapping[str, Any], sm: int
    ) -> None:
        self._op, self._sm = op, sm
        axes = dict.fromkeys(n for spec in inputs for n in spec.shape if isinstance(n, str))
        self._names = {name: _axis_name(index) for index, name in enumerate(axes)}
        self._env, self._symbols = ShapeEnv(), dict[Any, str]()
        launches: list[tuple[Any, tuple[Any, ...], tuple[Any, ...], dict[str, Any]]] = []
        with FakeTensorMode(shape_env=self._env), torch.no_grad():
            sizes = {name: self._symbol(self._names[name], i) for i, name in enumerate(axes)}
            tensors = [
                torch.empty([sizes.get(n, n) for n in spec.shape], dtype=spec.dtype)  # type: ignore[arg-type]
                for spec in inputs
            ]
            with capture_launches(lambda *launched: launches.append(launched), sm):
                results = OPS[op].run(*tensors, **attributes)
        (self._launch,) = launches
        self._tensors = (*tensors, *results)
        self.inputs, self.outputs = self._values(tensors), self._values(results)

    def _symbol(self, name: str, index: int) -> SymInt:
        source, size = ConstantSource(name), _LIKELY + 2 * index
        symbol = self._env.create_symbol(
            size, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
        )
        self._symbols[symbol] = name
        axis = self._env.create_symintnode(symbol, hint=size, source=source)
        assert isinstance(axis, SymInt)
        return axis

    def compiled(self) -> tuple[Variant, bytes]:
        """Compile the kernel; return its description and its binary."""
        kernel, _, values, meta = self._launch
        # Alignment is taken for granted only where it holds at every size.
        typical = [self._factor(v) if isinstance(v, SymInt) else v for v in values]
        (concrete,) = record(self._sm, launch, kernel, (1,), *typical, **meta)
        if self._sm < concrete.oldest_sm:
            raise EnvironmentMismatchError(
                f"the plug-in of {self._op} needs sm{concrete.oldest_sm} or newer, not "
                f"sm{self._sm}; leave it out with --plugins none"
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # nothing that a user can act on
                compiled = compile_for(concrete, self._sm)
        except Exception as error:  # Triton's and its assembler's have no common base
            text = " ".join(str(error).split())
            raise WanxError(
                f"cannot compile {self._op} for sm{self._sm} ({type(error).__name__}: "
                f"{text:.200}); leave it out with --plugins none"
            ) from error
        facts, code = compiled.metadata, bytes(compiled.asm["cubin"])
        if facts.global_scratch_size or facts.profile_scratch_size or facts.num_ctas != 1:
            raise WanxError(f"{self._op} needs memory or clusters that a plan does not provide")
        variant = Variant(
            sm=self._sm,
            function=facts.name,
            size=len(code),
            warps=facts.num_warps,
            shared=facts.shared,
            arguments=self.arguments,
            grid=self.grid,
        )
        return variant, code

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """The kernel's arguments, in its order."""
        return tuple(map(self._argument, self._launch[2]))

    @property
    def grid(self) -> tuple[Expression, Expression, Expression]:
        """Blocks along each axis."""
        x, y, z = map(self._tokens, (*self._launch[1], 1, 1)[:3])
        return x, y, z

    def _values(self, tensors: Sequence[Tensor]) -> tuple[Value, ...]:
        def size(n: int | SymInt) -> int | str:
            (token,) = self._tokens(n)
            return token

        return tuple(
            Value(dtype=ELEMENTS[tensor.dtype], shape=tuple(map(size, tensor.shape)))
            for tensor in tensors
        )

    def _argument(self, value: object) -> Argument:
        if isinstance(value, Tensor):
            return self._pointer(value)
        if isinstance(value, float):
            return Real(real=value)
        assert isinstance(value, int | SymInt)
        return Integer(integer=self._tokens(value))

    def _pointer(self, tensor: Tensor) -> Pointer:
        storages = [t.untyped_storage()._cdata for t in self._tensors]
        offset = tensor.storage_offset() * tensor.itemsize
        assert isinstance(offset, int)
        assert offset % _ALIGNED == 0
        return Pointer(tensor=storages.index(tensor.untyped_storage()._cdata), offset=offset)

    def _factor(self, value: SymInt) -> int:
        """Return a number that is a multiple of 16 if ``value`` always is."""
        return int(value.node.expr.as_coeff_Mul()[0]) if value.node.expr.is_Mul else 1

    def _tokens(self, size: int | SymInt) -> tuple[Token, ...]:
        return (size,) if isinstance(size, int) else tuple(self._postfix(size.node.expr))

    def _postfix(self, expression: Any) -> list[Token]:
        """Translate an expression of SymPy to postfix notation."""
        if expression.is_Integer:
            return [int(expression)]
        if expression.is_Symbol:
            return [self._symbols[expression]]
        signs: dict[str, Token] = {"Add": "+", "Mul": "*", "FloorDiv": "//"}
        sign = signs.get(type(expression).__name__)
        if sign is None:
            raise WanxError(f"{self._op} is launched on {expression}, which a plan cannot hold")
        first, *others = map(self._postfix, expression.args)
        return [*first, *(token for other in others for token in (*other, sign))]


def _axis_name(index: int) -> str:
    return f"{string.ascii_lowercase[index % 26]}{index // 26 or ''}"
