"""Bounds on what a PyTorch pickle may build, found by following its opcodes without executing them.

PyTorch's own unpickler runs nothing foreign, but a few hundred bytes can make it hash a tuple of
2^40 leaves or allocate gigabytes. A dictionary of tensors needs little of what it accepts.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MAX_PICKLE_BYTES = 16 << 20  # that of a 14B transformer, 1,095 tensors, has 0.12 MB
_MAX_OPCODES = 1 << 20
_MAX_CALLS = 100_000  # tensors, for most of them
_MAX_TUPLE = 1000  # leaves, nested ones included

_CALLED = {
    "collections OrderedDict",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_parameter_with_state",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
}
# Named, and never called.
_STORAGE = re.compile(r"torch \w+Storage|torch\.storage (Untyped|Typed)Storage")

_CONSTANTS = {
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINSTRING", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT"),
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class PickleError(ValueError):
    """A pickle is damaged, or builds more than a dictionary of tensors.

    Attributes:
        function: what it would call and may not, such as ``os.system``.
    """

    def __init__(self, reason: str, function: str | None = None) -> None:
        super().__init__(reason)
        self.function = function


@dataclass(frozen=True, slots=True)
class _Value:
    leaves: int = 1
    name: str | None = None  # of a global


def scan_pickle(data: bytes) -> None:
    """Check that a pickle builds no more than a dictionary of tensors needs.

    Raises:
        PickleError: says why not.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise PickleError(f"its pickle has over {MAX_PICKLE_BYTES >> 20} MB")
    stack: list[_Value] = []
    marks: list[int] = []
    memo: dict[Any, _Value] = {}
    calls = 0

    def pop(count: int) -> list[_Value]:
        if count > len(stack) - (marks[-1] if marks else 0):
            raise PickleError("its pickle is damaged")
        taken = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return taken

    def pop_to_mark() -> list[_Value]:
        if not marks:
            raise PickleError("its pickle is damaged")
        taken = stack[marks[-1] :]
        del stack[marks.pop() :]
        return taken

    def push_tuple(items: list[_Value]) -> None:
        leaves = 1 + sum(item.leaves for item in items)
        if leaves > _MAX_TUPLE:
            raise PickleError(f"its pickle has a tuple of over {_MAX_TUPLE} leaves")
        stack.append(_Value(leaves))

    for number, (opcode, argument) in enumerate(_opcodes(data)):
        if number == _MAX_OPCODES:
            raise PickleError(f"its pickle has over {_MAX_OPCODES} opcodes")
        match opcode:
            case "PROTO" | "STOP":
                pass
            case "GLOBAL":
                if argument not in _CALLED and not _is_named(argument):
                    name = argument.replace(" ", ".")
                    raise PickleError(f"its pickle names {name}", name)
                stack.append(_Value(name=argument))
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                push_tuple(pop_to_mark())
            case _ if opcode in _TUPLES:
                push_tuple(pop(_TUPLES[opcode]))
            case _ if opcode in _CONSTANTS:
                stack.append(_Value())
            case "REDUCE":
                function, _ = pop(2)
                if function.name not in _CALLED:
                    name = None if function.name is None else function.name.replace(" ", ".")
                    raise PickleError(f"its pickle calls {name or 'a value'}", name)
                calls += 1
                if calls > _MAX_CALLS:
                    raise PickleError(f"its pickle makes over {_MAX_CALLS} calls")
                stack.append(_Value())
            case "BINPERSID":
                pop(1)
                stack.append(_Value())
            case "BUILD" | "APPEND":
                pop(1)
            case "SETITEM":
                pop(2)
            case "SETITEMS" | "APPENDS":
                pop_to_mark()
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = (top := pop(1)[0])
                stack.append(top)
            case "BINGET" | "LONG_BINGET":
                if argument not in memo:
                    raise PickleError("its pickle is damaged")
                stack.append(memo[argument])
            case _:
                raise PickleError(f"its pickle has the opcode {opcode}")


def _is_named(name: str) -> bool:
    """True if a global is a storage or a dtype, which a tensor may have."""
    module, _, attribute = name.partition(" ")
    if module == "torch":
        import torch

        if isinstance(getattr(torch, attribute, None), torch.dtype):
            return True
    return _STORAGE.fullmatch(name) is not None


def _opcodes(data: bytes) -> Iterator[tuple[str, Any]]:
    try:
        for opcode, argument, _ in pickletools.genops(data):
            yield opcode.name, argument
    except Exception as error:  # of pickletools, which says what is cut short or malformed
        raise PickleError("its pickle is damaged") from error
