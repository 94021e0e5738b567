"""GGUF files: tensors in blocks of few bits, which the package ``gguf`` widens.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Sides are stored innermost first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from wanx.checkpoints.tensors.computed import ComputedTensor, Values
from wanx.checkpoints.tensors.source import FileTensor, TensorSource
from wanx.errors import CorruptInputError, EnvironmentMismatchError, UsageError
from wanx.files.input_file import open_input

MAGIC = b"GGUF"
_LED_BY_ONE = ("modulation", "img_emb.emb_pos")  # tensors of three sides
_PLAIN = {"F32": "F32", "F16": "F16", "BF16": "BF16"}


@dataclass(frozen=True, kw_only=True)
class GGUFFile:
    """Content of a GGUF file, of which no block is read yet.

    Attributes:
        tensors: by name, as they are called there.
        architecture: such as ``wan`` or ``t5encoder``; empty where the file says nothing.
        fields: the other metadata, by key; read with :meth:`value`.
    """

    tensors: dict[str, TensorSource]
    architecture: str
    fields: dict[str, Any]

    def value(self, key: str) -> Any:
        """A number, a text, or a list of them; None where there is none.

        Raises:
            CorruptInputError: its bytes are no such thing.
        """
        field = self.fields.get(key)
        try:
            return None if field is None else field.contents()
        except ValueError:  # what is no UTF-8, for one
            raise CorruptInputError(
                f"{key!r} of a GGUF file is damaged; download it again"
            ) from None


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
    gguf = _package("gguf")
    open_input(path).close()
    try:
        reader = gguf.GGUFReader(path)
        if reader.endianess != gguf.GGUFEndian.LITTLE:
            raise UsageError(f"{path} is big-endian, which wanx does not read; use another file")
        tensors = {tensor.name: _source(path, tensor) for tensor in reader.tensors}
        field = reader.fields.get("general.architecture")
        architecture = "" if field is None else str(field.contents())
    except (CorruptInputError, UsageError):
        raise
    except Exception as error:  # whatever the reader stumbles over in damaged bytes
        unknown = "is not a valid GGMLQuantizationType" in str(error)
        if unknown:
            raise UsageError(
                f"{path}: {error}, as far as this version of the package gguf knows; pip install "
                "-U gguf, or use a file in another type"
            ) from None
        raise CorruptInputError(
            f"{path} is a truncated or damaged GGUF file ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:120]}); download it again"
        ) from None
    return GGUFFile(tensors=tensors, architecture=architecture, fields=dict(reader.fields))


def _source(path: Path, tensor: Any) -> TensorSource:
    shape = tuple(int(side) for side in reversed(tensor.shape.tolist()))
    if tensor.name.endswith(_LED_BY_ONE) and len(shape) == 2:
        shape = (1, *shape)  # as sides of 1 are not stored
    kind, count = tensor.tensor_type, math.prod(shape)
    place: dict[str, Any] = {"name": tensor.name, "shape": shape, "file": path}
    place["offset"] = int(tensor.data_offset)
    if kind.name in _PLAIN:
        dtype = _PLAIN[kind.name]
        return FileTensor(dtype=dtype, nbytes=int(tensor.n_bytes), **place)
    numbers, size = _package("gguf").GGML_QUANT_SIZES[kind]
    if not _widens(kind, size) or len(shape) < 2 or shape[-1] % numbers:
        raise UsageError(
            f"{path}: {tensor.name!r} is in {kind.name}, which the package gguf does not widen; "
            "use a file in another type"
        )
    return GGUFTensor(dtype="F32", nbytes=4 * count, block=(numbers, size), kind=kind, **place)


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
