"""External data of an ONNX graph, read from its bytes without the onnx package.

The runtime has no onnx, yet must know which files a graph will make ONNX Runtime open before it
does. The walker follows every path of the protobuf schema that reaches a TensorProto (field numbers
of onnx.proto3, IR version 13). Where readers could differ in what they see, it refuses.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from wanx.errors import CorruptInputError

_CHILDREN: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {
        5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor",
    },
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
}  # fmt: skip
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14  # fields of TensorProto
_MAX_DEPTH = 100  # protobuf's own limit

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types; 3 and 4 (groups) ONNX never uses


class ExternalData(NamedTuple):
    """Location of a tensor's values: bytes of a file; without ``length``, up to its end."""

    location: str
    offset: int
    length: int | None


def external_data(model: bytes) -> Iterator[ExternalData]:
    """Yield the external data of every tensor of a serialised ModelProto.

    Raises:
        CorruptInputError: the bytes are not a well-formed model.
    """
    return _walk(memoryview(model), "Model", 0)


def _walk(message: memoryview, kind: str, depth: int) -> Iterator[ExternalData]:
    if depth > _MAX_DEPTH:
        raise CorruptInputError("graph damaged: nested too deeply")
    if kind == "Tensor":
        yield from _tensor(message)
        return
    children = _CHILDREN[kind]
    for number, wire, value in _fields(message):
        child = children.get(number)
        if child and wire == _BYTES:
            assert isinstance(value, memoryview)
            yield from _walk(value, child, depth + 1)


def _tensor(message: memoryview) -> Iterator[ExternalData]:
    entries: dict[str, str] = {}
    external = False
    for number, wire, value in _fields(message):
        if number == _DATA_LOCATION and wire == _VARINT:
            external = external or value != 0
        elif number == _EXTERNAL_DATA and isinstance(value, memoryview):
            key, text = _key_and_value(value)
            if key in entries:
                raise CorruptInputError(f"graph damaged: a tensor has two values for {key!r:.40}")
            entries[key] = text
    if not external and not entries:
        return
    if "location" not in entries:
        raise CorruptInputError("graph damaged: an external tensor names no file")
    length = entries.get("length")
    yield ExternalData(
        entries["location"],
        _parse_natural(entries.get("offset", "0")),
        None if length is None else _parse_natural(length),
    )


def _key_and_value(message: memoryview) -> tuple[str, str]:
    """The key and value of a StringStringEntryProto; for a repeated field the last one counts."""
    pair = {1: "", 2: ""}
    for number, _, value in _fields(message):
        if number in pair and isinstance(value, memoryview):
            try:
                pair[number] = str(value, "utf-8")
            except UnicodeDecodeError:
                raise CorruptInputError("graph damaged: a text is not UTF-8") from None
    return pair[1], pair[2]


def _parse_natural(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise CorruptInputError(f"graph damaged: {text!r:.40} is not an offset or length")
    return int(text)


def _fields(message: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """The fields of one message: number, wire type, value (bytes as a view, numbers as int)."""
    position, end = 0, len(message)
    while position < end:
        tag, position = _read_varint(message, position)
        number, wire = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise CorruptInputError(f"graph damaged: field number {number}")
        if wire == _VARINT:
            value, position = _read_varint(message, position)
            yield number, wire, value
            continue
        if wire == _BYTES:
            size, position = _read_varint(message, position)
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
        else:
            raise CorruptInputError(f"graph damaged: wire type {wire}")
        if size > end - position:
            raise CorruptInputError("graph damaged: it ends in the middle of a field")
        yield number, wire, message[position : position + size]
        position += size


def _read_varint(message: memoryview, position: int) -> tuple[int, int]:
    """Decode a variable-length integer; returns it with the position that follows it."""
    result = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise CorruptInputError("graph damaged: it ends in the middle of a number")
        byte = message[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, position
    raise CorruptInputError("graph damaged: a number is longer than 64 bits")
