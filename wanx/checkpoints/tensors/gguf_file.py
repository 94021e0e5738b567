"""GGUF files: tensors in blocks of few bits, which the package ``gguf`` widens."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from wanx.checkpoints.tensors.computed import ComputedTensor, Values
from wanx.checkpoints.tensors.gguf_header import MAGIC, GGUFEntry, read_gguf_header
from wanx.checkpoints.tensors.source import FileTensor, TensorSource
from wanx.config.number_formats import BY_SAFETENSORS
from wanx.errors import CorruptInputError, EnvironmentMismatchError, UsageError
from wanx.files.input_file import open_input

_LED_BY_ONE = ("modulation", "img_emb.emb_pos")  # tensors of three sides
_PLAIN = {"F32": "F32", "F16": "F16", "BF16": "BF16"}


@dataclass(frozen=True, kw_only=True)
class GGUFFile:
    """Content of a GGUF file, of which no block is read yet.

    Attributes:
        tensors: by name, as they are called there.
        fields: the other metadata, by key: numbers, texts, and lists of them.
    """

    tensors: dict[str, TensorSource]
    fields: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class GGUFTensor(ComputedTensor):
    """A tensor in blocks of numbers that share scales.

    Attributes:
        offset: of the first block, from the file's start.
        block: numbers and bytes of a block.
        kind: ``gguf.GGMLQuantizationType`` of the blocks.
    """

    offset: int
    block: tuple[int, int]
    kind: Any

    @property
    def stored_bytes(self) -> int:
        """Size of the blocks."""
        numbers, size = self.block
        return math.prod(self.shape) // numbers * size

    @property
    def position(self) -> int:
        """The offset."""
        return self.offset

    def rows(self, numbers: int, *, wide: bool) -> Iterator[Values]:
        """Widen rows, which are whole blocks, to fp32 as the package ``gguf`` does."""
        quants = _package("gguf.quants")
        per_block, size = self.block
        row = self.columns // per_block * size
        left = self.shape[0]
        with open_input(self.file) as file:
            file.seek(self.offset)
            while left:
                height = min(left, self.rows_at_once(numbers))
                data = file.read(height * row)
                if len(data) != height * row:
                    raise CorruptInputError(
                        f"{self.file} ended inside tensor {self.name!r}; it was cut while being "
                        "read, so restore it and run again"
                    )
                blocks = np.frombuffer(data, np.uint8).reshape(height, row)
                values: Values = quants.dequantize(blocks, self.kind)
                left -= height
                yield values.astype(np.float64) if wide else values


def is_gguf(path: Path) -> bool:
    """True if a file begins as GGUF files do."""
    with open_input(path) as file:
        return file.read(len(MAGIC)) == MAGIC


def read_gguf(path: Path) -> GGUFFile:
    """Read the names, places and metadata of a GGUF file; blocks are not touched.

    Raises:
        CorruptInputError: it is truncated or damaged.
        EnvironmentMismatchError: the package ``gguf`` is missing.
        UsageError: it holds tensors in a type that nothing widens.
    """
    package = _package("gguf")
    with open_input(path) as file:
        size = os.fstat(file.fileno()).st_size
        header = read_gguf_header(file, str(path))
    tensors: dict[str, TensorSource] = {}
    for entry in header.tensors:
        source, stored = _source(path, entry, package)
        if entry.name in tensors:
            raise CorruptInputError(f"{path} holds {entry.name[:80]!r} twice; download it again")
        if entry.offset + stored > size:
            raise CorruptInputError(
                f"{path} is a truncated or damaged GGUF file (it has {size} bytes, and "
                f"{entry.name[:80]!r} ends at {entry.offset + stored}); download it again"
            )
        tensors[entry.name] = source
    return GGUFFile(tensors=tensors, fields=header.fields)


def _source(path: Path, entry: GGUFEntry, package: Any) -> tuple[TensorSource, int]:
    """Tensor of an entry, and how many bytes of the file it takes."""
    try:
        kind = package.GGMLQuantizationType(entry.kind)
    except ValueError:
        raise UsageError(
            f"{path}: {entry.name[:80]!r} is of type {entry.kind}, which this version of the "
            "package gguf does not know; pip install -U gguf, or use a file in another type"
        ) from None
    shape = entry.shape
    if entry.name.endswith(_LED_BY_ONE) and len(shape) == 2:
        shape = (1, *shape)  # as sides of 1 are not stored
    count = math.prod(shape)
    place: dict[str, Any] = {
        "name": entry.name, "shape": shape, "file": path, "offset": entry.offset,
    }  # fmt: skip
    if kind.name in _PLAIN:
        dtype = _PLAIN[kind.name]
        nbytes = BY_SAFETENSORS[dtype].nbytes(count)
        return FileTensor(dtype=dtype, nbytes=nbytes, **place), nbytes
    numbers, size = package.GGML_QUANT_SIZES[kind]
    if not _widens(kind, size) or len(shape) < 2 or shape[-1] % numbers:
        raise UsageError(
            f"{path}: {entry.name[:80]!r} is in {kind.name}, which the package gguf does not "
            "widen; use a file in another type"
        )
    block = (numbers, size)
    source = GGUFTensor(dtype="F32", nbytes=4 * count, block=block, kind=kind, **place)
    return source, source.stored_bytes


@functools.cache
def _widens(kind: Any, size: int) -> bool:
    """True if the package ``gguf`` can widen blocks of a kind."""
    try:
        _package("gguf.quants").dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise EnvironmentMismatchError(
            "a GGUF file is read with the package gguf, which is not installed: pip install "
            "'wanx[gguf]'"
        ) from None
