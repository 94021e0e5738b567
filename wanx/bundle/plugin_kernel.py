"""Compiled kernel with all that its launch needs, embedded in a TensorRT plan.

The description is JSON, the code the binaries of all GPUs one after the other. Plans may come from
anywhere, so everything in the description is bounded, and nothing in it is a program: sizes are
computed by expressions in postfix notation, of integers, axes of inputs, ``+``, ``*`` and ``//``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import add, floordiv, mul
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, ValidationError
from pydantic import model_validator as checked

from wanx.bundle.record import Record, first_problem
from wanx.config.number_formats import KERNEL_TENSORS, one_of
from wanx.errors import CorruptInputError, EnvironmentMismatchError, WanxError

MAX_DESCRIPTION = 1 << 18
MAX_CODE = 64 << 20
LARGEST = 1 << 31
ELF = b"\x7fELF"
_GRID_LIMITS = (LARGEST - 1, 65535, 65535)
_HOPPER = 90

Name = Annotated[str, StringConstraints(pattern="^[A-Za-z_][A-Za-z0-9_]{0,127}$")]
Axis = Annotated[str, StringConstraints(pattern="^[a-z][0-9]{0,2}$")]
Number = Annotated[int, Field(ge=-LARGEST, le=LARGEST)]
Size = Annotated[int, Field(ge=0, lt=LARGEST)]
Token = Number | Axis | Literal["+", "*", "//"]
Expression = Annotated[tuple[Token, ...], Field(min_length=1, max_length=32)]
ElementType = Annotated[str, StringConstraints(pattern=one_of(row.name for row in KERNEL_TENSORS))]


class Value(Record):
    """An input or output: its type, and its shape, whose axes are numbers or named."""

    dtype: ElementType
    shape: Annotated[tuple[Size | Axis, ...], Field(max_length=8)]


class Pointer(Record):
    """The address of a tensor, inputs before outputs, and ``offset`` bytes into it."""

    tensor: Annotated[int, Field(ge=0, lt=64)]
    offset: Size = 0


class Integer(Record):
    """A 32-bit number that depends on sizes."""

    integer: Expression


class Real(Record):
    """A number in fp32."""

    real: Annotated[float, Field(allow_inf_nan=False)]


Argument = Pointer | Integer | Real


class Variant(Record):
    """The kernel for one GPU.

    Attributes:
        sm: the GPU, such as 89.
        function: the kernel's name in its binary.
        size: bytes of the binary.
        warps: of a block of threads.
        shared: bytes of dynamic shared memory of a block.
        arguments: in the kernel's order, without those that Triton adds.
        grid: blocks along each axis.
    """

    sm: Annotated[int, Field(ge=75, le=999)]
    function: Name
    size: Annotated[int, Field(gt=0, le=MAX_CODE)]
    warps: Annotated[int, Field(ge=1, le=32)]
    shared: Annotated[int, Field(ge=0, le=228 << 10)]
    arguments: Annotated[tuple[Argument, ...], Field(max_length=64)]
    grid: tuple[Expression, Expression, Expression]

    def grid_at(self, axes: Mapping[str, int]) -> tuple[int, ...]:
        """Evaluate the blocks along each axis.

        Raises:
            WanxError: more than a GPU takes.
        """
        blocks = tuple(evaluate(expression, axes) for expression in self.grid)
        if any(not 0 <= n <= limit for n, limit in zip(blocks, _GRID_LIMITS, strict=True)):
            raise WanxError(f"{self.function} would need {blocks} blocks; choose a smaller size")
        return blocks

    def integers_at(self, axes: Mapping[str, int]) -> dict[int, int]:
        """Evaluate the integer arguments, by their index.

        Raises:
            WanxError: one does not fit 32 bits.
        """
        values = {
            index: evaluate(argument.integer, axes)
            for index, argument in enumerate(self.arguments)
            if isinstance(argument, Integer)
        }
        if any(not -LARGEST <= value < LARGEST for value in values.values()):
            raise WanxError(f"{self.function} counts past 32 bits; choose a smaller size")
        return values


class Description(Record):
    """Inputs and outputs of a kernel, and its launch on each GPU."""

    schema_version: Literal[1] = 1
    op: Name
    inputs: Annotated[tuple[Value, ...], Field(min_length=1, max_length=24)]
    outputs: Annotated[tuple[Value, ...], Field(min_length=1, max_length=8)]
    variants: Annotated[tuple[Variant, ...], Field(min_length=1, max_length=16)]

    @property
    def axes(self) -> dict[str, tuple[int, int]]:
        """The first input and its axis for each named axis."""
        first: dict[str, tuple[int, int]] = {}
        for index, value in enumerate(self.inputs):
            for axis, size in enumerate(value.shape):
                if isinstance(size, str):
                    first.setdefault(size, (index, axis))
        return first

    @checked(mode="after")
    def _is_consistent(self) -> Self:
        known = self.axes.keys()
        if any(isinstance(n, str) and n not in known for v in self.outputs for n in v.shape):
            raise ValueError("an output has an axis that no input has")
        count = len(self.inputs) + len(self.outputs)
        for variant in self.variants:
            arguments = variant.arguments
            if any(isinstance(a, Pointer) and a.tensor >= count for a in arguments):
                raise ValueError("an argument is no tensor of the kernel")
            integers = (a.integer for a in arguments if isinstance(a, Integer))
            for expression in (*variant.grid, *integers):
                _require_expression(expression, known)
        if len({variant.sm for variant in self.variants}) < len(self.variants):
            raise ValueError("two variants are for one GPU")
        return self

    def axes_at(self, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
        """Infer the sizes of the named axes from the shapes of the inputs.

        Raises:
            WanxError: the shapes are not those that the kernel was made for.
        """
        if len(shapes) != len(self.inputs):
            raise WanxError(f"{self.op} has {len(self.inputs)} inputs, not {len(shapes)}")
        sizes: dict[str, int] = {}
        for value, shape in zip(self.inputs, shapes, strict=True):
            if not value.shape and math.prod(shape) == 1:
                continue  # TensorRT may give a scalar an axis
            fits = len(shape) == len(value.shape)
            for name, size in zip(value.shape, shape, strict=False):
                known = sizes.setdefault(name, size) if isinstance(name, str) else name
                fits = fits and known == size
            if not fits:
                expected = ", ".join(map(str, value.shape))
                raise WanxError(f"{self.op} was compiled for [{expected}], not {list(shape)}")
        return sizes


def _require_expression(expression: Expression, axes: object) -> None:
    depth = 0
    for token in expression:
        if token in ("+", "*", "//"):
            depth -= 1
            if depth < 1:
                raise ValueError("an expression lacks operands")
        else:
            if isinstance(token, str) and token not in axes:  # type: ignore[operator]
                raise ValueError(f"an expression has the axis {token}, which no input has")
            depth += 1
    if depth != 1:
        raise ValueError("an expression has several values")


def evaluate(expression: Expression, axes: Mapping[str, int]) -> int:
    """Compute an expression.

    Raises:
        WanxError: it divides by zero, or passes 64 bits.
    """
    stack: list[int] = []
    for token in expression:
        if isinstance(token, int):
            stack.append(token)
        elif token in axes:
            stack.append(axes[token])
        else:
            right, left = stack.pop(), stack.pop()
            if token == "//" and right == 0:
                raise WanxError("a kernel's description divides by zero")
            operation = {"+": add, "*": mul, "//": floordiv}[str(token)]
            stack.append(operation(left, right))
        if abs(stack[-1]) >= 1 << 63:
            raise WanxError("a kernel's description computes a number past 64 bits")
    return stack[0]


@dataclass(frozen=True, kw_only=True)
class PluginKernel:
    """A description and the binaries of its variants, one after the other."""

    description: Description
    code: bytes

    def fields(self) -> tuple[bytes, bytes]:
        """Description and code as bytes; :func:`read_plugin_kernel` reads them."""
        return self.description.model_dump_json().encode(), self.code

    def variant_for(self, sm: int) -> tuple[Variant, bytes]:
        """Select the variant for the GPU ``sm``, and its binary.

        Raises:
            EnvironmentMismatchError: there is nothing for it.
        """
        # A binary also runs on later GPUs of its generation; those from Hopper on use features
        # of one GPU alone.
        candidates = [
            (variant, binary)
            for variant, binary in self._binaries()
            if variant.sm == sm or (variant.sm // 10 == sm // 10 and variant.sm < sm < _HOPPER)
        ]
        if not candidates:
            known = ", ".join(f"sm{variant.sm}" for variant in self.description.variants)
            raise EnvironmentMismatchError(
                f"the engine's {self.description.op} was built for {known}, and this GPU is "
                f"sm{sm}: build the engine for it"
            )
        return max(candidates, key=lambda pair: pair[0].sm)

    def _binaries(self) -> Iterator[tuple[Variant, bytes]]:
        start = 0
        for variant in self.description.variants:
            yield variant, self.code[start : start + variant.size]
            start += variant.size


def read_plugin_kernel(description: bytes, code: bytes) -> PluginKernel:
    """Read the bytes of :meth:`PluginKernel.fields`.

    Raises:
        CorruptInputError: it is nothing that a build writes.
    """
    try:
        if len(description) > MAX_DESCRIPTION or len(code) > MAX_CODE:
            raise ValueError(f"they are {len(description)} and {len(code)} bytes")
        parsed = Description.model_validate_json(description)
        if sum(variant.size for variant in parsed.variants) != len(code):
            raise ValueError(f"the binaries are not {len(code)} bytes together")
        kernel = PluginKernel(description=parsed, code=code)
        if not all(binary.startswith(ELF) for _, binary in kernel._binaries()):
            raise ValueError("a binary is no compiled code")
    except ValidationError as error:
        reason = first_problem(error, "description")
    except ValueError as error:
        reason = str(error)
    else:
        return kernel
    raise CorruptInputError(
        f"the engine's kernels are damaged or not made by wanx ({reason}); build the engine again"
    )
