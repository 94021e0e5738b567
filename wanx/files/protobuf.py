"""Wire format of protocol buffers, read and written without their schemas.

See https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from collections.abc import Iterator

from wanx.errors import CorruptInputError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types; 3 and 4 (groups) are of old
Field = tuple[int, int, int | memoryview]


def fields(message: memoryview, damaged: str) -> Iterator[Field]:
    """Yield the fields of one message: number, wire type, value (bytes as a view, numbers as int).

    Args:
        message: its bytes.
        damaged: begins the line that says what is wrong with them.

    Raises:
        CorruptInputError: the bytes are no message.
    """
    position, end = 0, len(message)
    while position < end:
        tag, position = _read_varint(message, position, damaged)
        number, wire = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise CorruptInputError(f"{damaged}: field number {number}")
        if wire == VARINT:
            value, position = _read_varint(message, position, damaged)
            yield number, wire, value
            continue
        if wire == BYTES:
            size, position = _read_varint(message, position, damaged)
        elif wire in (FIXED64, FIXED32):
            size = 8 if wire == FIXED64 else 4
        else:
            raise CorruptInputError(f"{damaged}: wire type {wire}")
        if size > end - position:
            raise CorruptInputError(f"{damaged}: it ends in the middle of a field")
        yield number, wire, message[position : position + size]
        position += size


def encode_field(number: int, wire: int, value: int | bytes | memoryview) -> bytes:
    """Encode one field; the inverse of what :func:`fields` yields."""
    tag = _encode_varint(number << 3 | wire)
    if wire == VARINT:
        assert isinstance(value, int)
        return tag + _encode_varint(value)
    assert not isinstance(value, int)
    return tag + (_encode_varint(len(value)) if wire == BYTES else b"") + bytes(value)


def _encode_varint(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*data, value))


def _read_varint(message: memoryview, position: int, damaged: str) -> tuple[int, int]:
    """Decode a variable-length integer; returns it with the position that follows it."""
    result = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise CorruptInputError(f"{damaged}: it ends in the middle of a number")
        byte = message[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, position
    raise CorruptInputError(f"{damaged}: a number is longer than 64 bits")
