"""External data of an ONNX graph, read and renamed in its bytes without the onnx package.

The runtime has no onnx, yet must know which files a graph will make ONNX Runtime open before it
does. The walker follows every path of the protobuf schema that reaches a TensorProto (field numbers
of onnx.proto3, IR version 13). Where readers could differ in what they see, it refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from wanx.errors import CorruptInputError
from wanx.files.protobuf import BYTES, VARINT, Field, encode_field, fields

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


def renamed_locations(model: bytes, rename: Callable[[str], str]) -> bytes:
    """Copy a serialised ModelProto with other locations of external data.

    Args:
        model: whose external data is well-formed.
        rename: gives the new location for an old one.

    Raises:
        CorruptInputError: the bytes are not a well-formed model.
    """
    return _renamed(memoryview(model), "Model", rename)


def _renamed(message: memoryview, kind: str, rename: Callable[[str], str]) -> bytes:
    parts = []
    children = _CHILDREN.get(kind, {})
    for number, wire, value in _graph_fields(message):
        if wire == BYTES and isinstance(value, memoryview):
            if child := children.get(number):
                value = memoryview(_renamed(value, child, rename))
            elif kind == "Tensor" and number == _EXTERNAL_DATA:
                key, text = _key_and_value(value)
                if key == "location":
                    pair = {1: key, 2: rename(text)}
                    value = memoryview(
                        b"".join(encode_field(n, BYTES, t.encode()) for n, t in pair.items())
                    )
        parts.append(encode_field(number, wire, value))
    return b"".join(parts)


def _walk(message: memoryview, kind: str, depth: int) -> Iterator[ExternalData]:
    if depth > _MAX_DEPTH:
        raise CorruptInputError("graph damaged: nested too deeply")
    if kind == "Tensor":
        yield from _tensor(message)
        return
    children = _CHILDREN[kind]
    for number, wire, value in _graph_fields(message):
        child = children.get(number)
        if child and wire == BYTES:
            assert isinstance(value, memoryview)
            yield from _walk(value, child, depth + 1)


def _tensor(message: memoryview) -> Iterator[ExternalData]:
    entries: dict[str, str] = {}
    external = False
    for number, wire, value in _graph_fields(message):
        if number == _DATA_LOCATION and wire == VARINT:
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
    for number, _, value in _graph_fields(message):
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


def _graph_fields(message: memoryview) -> Iterator[Field]:
    return fields(message, "graph damaged")
