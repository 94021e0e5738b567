"""Safetensors files: a header reader that trusts nothing, and a streaming writer.

Layout: 8 bytes of header length (little endian), the header in JSON, then the tensors' bytes
without gaps. See https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from wanx.config.number_formats import BY_SAFETENSORS
from wanx.errors import CorruptInputError
from wanx.files.hashing import HashingFile
from wanx.files.input_file import open_input, parse_json_object

MAX_HEADER_BYTES = 100_000_000
_METADATA = "__metadata__"
_MAX_BYTES = 1 << 63
_ALIGNMENT = 64  # of the first tensor in files that we write: a cache line
_WRITE_BYTES = 1 << 20  # larger writes into the page cache measured 2-4 times slower


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Location of a tensor: ``nbytes`` little-endian bytes at ``offset`` from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """Tensors of a safetensors file, in the order of its bytes; ``size`` is that of the file."""

    path: Path
    entries: dict[str, TensorRef]
    metadata: dict[str, str]
    size: int


def read_header(path: Path) -> SafetensorsHeader:
    """Read and validate the header of a safetensors file; tensor bytes are not touched.

    Raises:
        CorruptInputError: the file is missing, truncated, padded, or its header is not one.
        WanxError: the operating system refuses to read it.
    """
    with open_input(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8:
            raise _corrupt(path, f"{size} bytes are too few for a safetensors file")
        if length > MAX_HEADER_BYTES:
            raise _corrupt(
                path, f"its header claims {length} bytes, above the limit of {MAX_HEADER_BYTES}"
            )
        if 8 + length > size:
            raise _corrupt(path, f"its header claims {length} bytes, the file has {size}")
        raw = parse_json_object(file.read(length), path)

    metadata = raw.pop(_METADATA, None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _corrupt(path, f"{_METADATA} is not a table of strings")
    refs = [_parse_entry(path, name, info, data_start=8 + length) for name, info in raw.items()]
    refs.sort(key=lambda ref: (ref.offset, ref.nbytes))
    end = 8 + length
    for ref in refs:
        if ref.offset != end:
            relation = "overlaps the tensor before it" if ref.offset < end else "leaves a gap"
            raise _corrupt(
                path, f"tensor {ref.name[:80]!r} at byte {ref.offset} {relation} (at {end})"
            )
        end += ref.nbytes
    if end != size:
        state = "truncated" if end > size else "padded"
        raise _corrupt(path, f"{state}: its header describes {end} bytes, the file has {size}")
    return SafetensorsHeader(path, {ref.name: ref for ref in refs}, metadata, size)


def _parse_entry(path: Path, name: str, info: Any, data_start: int) -> TensorRef:
    match info:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]} if all(
            type(n) is int and 0 <= n < _MAX_BYTES for n in (*shape, begin, end)
        ):
            pass
        case _:
            raise _corrupt(path, f"the header entry of tensor {name[:80]!r} is malformed")
    if dtype not in BY_SAFETENSORS:
        raise CorruptInputError(
            f"{path}: tensor {name[:80]!r} has the data type {dtype[:32]!r}, which wanx does "
            "not read; convert it to F32, BF16 or F16"
        )
    needed = _tensor_bytes(dtype, shape)
    if needed is None or begin + needed != end:
        raise _corrupt(
            path,
            f"tensor {name[:80]!r} spans {end - begin} bytes, which its shape and type do not fill",
        )
    return TensorRef(name, dtype, tuple(shape), path, data_start + begin, needed)


def _tensor_bytes(dtype: str, shape: Iterable[int]) -> int | None:
    """Bytes of a tensor; None past 2^63, found without multiplying ever larger numbers."""
    bits = BY_SAFETENSORS[dtype].bits
    for side in shape:
        bits *= side
        if bits >= 8 * _MAX_BYTES:
            return None
    return None if bits % 8 else bits // 8


def _corrupt(path: Path, problem: str) -> CorruptInputError:
    return CorruptInputError(f"{path}: {problem}; download or export the file again")


class SafetensorsWriter:
    """Writes a safetensors file in one pass, hashing as it goes.

    The tensors' bytes follow in the order of the list, in chunks of any size. Use it as a context
    manager: leaving it normally checks that all bytes came and syncs the file to disk; leaving it
    through an exception removes the file.

    Attributes:
        header: the header being written, with the place of every tensor in the file.
    """

    def __init__(
        self,
        path: Path,
        tensors: Iterable[tuple[str, str, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Create the file and write its header.

        Args:
            path: file to create; it must not exist.
            tensors: name, dtype (a key of ``BY_SAFETENSORS``) and shape of each tensor, in order.
                List wider types first: a tensor must start at a multiple of its item size.
            metadata: text to keep in the header.

        Raises:
            WanxError: the file cannot be created or written.
        """
        text, sizes = _render_header(tensors, metadata)
        entries: dict[str, TensorRef] = {}
        offset = len(text)
        for (name, dtype, shape), nbytes in sizes:
            entries[name] = TensorRef(name, dtype, shape, path, offset, nbytes)
            offset += nbytes
        self.header = SafetensorsHeader(path, entries, dict(metadata or {}), offset)
        self._file = HashingFile(path, offset)
        try:
            self._file.write(text)
        except BaseException:
            self._file.abort()
            raise

    @property
    def sha256(self) -> str:
        """Digest of the finished file in hex; empty before it is closed."""
        return self._file.sha256

    def write(self, chunk: bytes | bytearray | memoryview) -> None:
        """Append bytes; see :meth:`HashingFile.write`."""
        self._file.write(chunk)

    def close(self) -> None:
        """Finish the file; see :meth:`HashingFile.close`."""
        self._file.close()

    def abort(self) -> None:
        """Stop and remove the unfinished file."""
        self._file.abort()

    def __enter__(self) -> Self:
        """Return the writer itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the finished file, or remove it when it is not whole."""
        self._file.__exit__(kind, error, traceback)


def _render_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None
) -> tuple[bytes, list[tuple[tuple[str, str, tuple[int, ...]], int]]]:
    """Header bytes, padded so that the data starts aligned, and the size of each tensor."""
    table: dict[str, Any] = {_METADATA: dict(metadata or {})}
    sizes = []
    end = 0
    for name, dtype, shape in tensors:
        nbytes = _tensor_bytes(dtype, shape)
        assert nbytes is not None, f"{name}: shape {shape} overflows"
        assert name not in table, f"{name}: listed twice"
        bits = BY_SAFETENSORS[dtype].bits
        assert 8 * end % bits == 0, f"{name}: misaligned, list wider types first"
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        sizes.append(((name, dtype, shape), nbytes))
        end += nbytes
    if not metadata:
        del table[_METADATA]
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, sizes
