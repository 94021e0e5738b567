"""Header of a GGUF file: metadata by key, and where its tensors are.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The package ``gguf`` reads it
too, in seconds and gigabytes where a vocabulary is in it, and not from a file that is elsewhere.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from wanx.errors import CorruptInputError, UsageError

MAGIC = b"GGUF"
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"} | {
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_ALIGNMENT = "general.alignment"
_MOST = 1 << 24  # keys, tensors, or values of an array, above which a count is damage
_LONGEST = 1 << 28  # bytes of one text or array
_MOST_SIDES = 8


@dataclass(frozen=True, slots=True)
class GGUFEntry:
    """A tensor: its sides, innermost last, and its place from the file's start.

    Attributes:
        name: as the file calls it.
        shape: of its numbers.
        kind: number of its type, as ``gguf.GGMLQuantizationType`` counts them.
        offset: of its first byte.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """Metadata and places of tensors, which come before the tensors themselves.

    Attributes:
        fields: numbers, texts and lists of them, by key; lists of numbers are arrays of NumPy.
        tensors: in the order of the file.
        data_start: where the first tensor begins.
    """

    fields: dict[str, Any]
    tensors: tuple[GGUFEntry, ...]
    data_start: int


def read_gguf_header(file: BinaryIO, name: str) -> GGUFHeader:
    """Read a header.

    Args:
        file: at its start.
        name: of the file, for errors.

    Raises:
        CorruptInputError: it is truncated or damaged.
        UsageError: it is big-endian, or of a version that is not read.
    """
    reader = _Reader(file)
    try:
        if reader.take(4) != MAGIC:
            raise _Damage("it does not begin with GGUF")
        version = reader.number("<u4")
        if version not in _VERSIONS:
            if version & 0xFFFF == 0:
                raise UsageError(f"{name} is big-endian, which wanx does not read; use another")
            raise UsageError(
                f"{name} is GGUF of version {version}, and wanx reads 2 and 3; convert it anew"
            )
        tensors, keys = reader.count(), reader.count()
        fields = {}
        for _ in range(keys):
            key = reader.text()
            fields[key] = reader.value(reader.number("<u4"))
        entries = [reader.entry() for _ in range(tensors)]
    except (_Damage, UnicodeDecodeError) as error:
        raise CorruptInputError(
            f"{name} is a truncated or damaged GGUF file ({str(error)[:120]}); download it again"
        ) from None
    alignment = fields.get(_ALIGNMENT, 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
        raise CorruptInputError(f"{name}: {_ALIGNMENT} is {alignment!r:.40}; download it again")
    start = -(-reader.position // alignment) * alignment
    return GGUFHeader(
        fields,
        tuple(GGUFEntry(e.name, e.shape, e.kind, start + e.offset) for e in entries),
        start,
    )


class _Damage(Exception):
    pass


class _Reader:
    """Values of a stream, each checked before anything of its size is made."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.position = file, 0

    def take(self, count: int) -> bytes:
        if count > _LONGEST:
            raise _Damage(f"{count} bytes at byte {self.position} are no text or list")
        data = self._file.read(count)
        if len(data) != count:
            raise _Damage(f"it ends at byte {self.position + len(data)}, inside its header")
        self.position += count
        return data

    def number(self, dtype: str) -> Any:
        kind = np.dtype(dtype)
        return np.frombuffer(self.take(kind.itemsize), kind)[0].item()

    def count(self) -> int:
        (count,) = struct.unpack("<Q", self.take(8))
        if count > _MOST:
            raise _Damage(f"{count} of something at byte {self.position}")
        return int(count)

    def text(self) -> str:
        (length,) = struct.unpack("<Q", self.take(8))
        return self.take(length).decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.number("<u4"), self.count()
            if inner == _STRING:
                return [self.text() for _ in range(count)]
            dtype = self._dtype(inner)
            return np.frombuffer(self.take(count * dtype.itemsize), dtype)
        return self.number(self._dtype(kind).str)

    def entry(self) -> GGUFEntry:
        name, sides = self.text(), self.number("<u4")
        if sides > _MOST_SIDES:
            raise _Damage(f"tensor {name[:80]!r} has {sides} sides")
        shape = tuple(reversed(struct.unpack(f"<{sides}Q", self.take(8 * sides))))
        if math.prod(shape) >= 1 << 48:
            raise _Damage(f"tensor {name[:80]!r} has {math.prod(shape)} numbers")
        return GGUFEntry(name, shape, self.number("<u4"), self.number("<u8"))

    def _dtype(self, kind: int) -> np.dtype[Any]:
        if kind not in _NUMBERS:
            raise _Damage(f"a value of the unknown type {kind} at byte {self.position}")
        return np.dtype(_NUMBERS[kind])
