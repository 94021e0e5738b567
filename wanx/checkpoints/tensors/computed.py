"""A tensor whose numbers are computed from what files hold, such as 8-bit weights with scales."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wanx.checkpoints.tensors.source import CHUNK_BYTES, TensorSource
from wanx.errors import CorruptInputError
from wanx.files.floats import Chunk, from_float64

Values = NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class ComputedTensor(TensorSource):
    """A tensor in fp32 that no file holds as such.

    Attributes:
        kept: type that it is stored in where an export keeps each tensor's own.
    """

    kept: str = "BF16"

    @property
    def storage(self) -> str:
        """Type that it is stored in where an export keeps each tensor's own."""
        return self.kept

    @abstractmethod
    def rows(self, numbers: int, *, wide: bool) -> Iterator[Values]:
        """Yield the rows in order, as ``[rows, columns]``; each piece is valid until the next.

        Args:
            numbers: to yield at a time, roughly: rows are whole.
            wide: in float64, with nothing rounded; else in float32.
        """

    @property
    def columns(self) -> int:
        """Length of a row: all sides but the first."""
        return math.prod(self.shape[1:]) if self.shape else 1

    def rows_at_once(self, numbers: int) -> int:
        """Number of rows that hold roughly so many numbers."""
        return max(1, numbers // max(1, self.columns))

    def iter_bytes(self, chunk: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """Yield the numbers as fp32."""
        for values in self.rows(chunk // 4, wide=False):
            self._require_numbers(values)
            data = np.ascontiguousarray(values, "<f4").reshape(-1).view(np.uint8).data
            for start in range(0, len(data), chunk):
                yield data[start : start + chunk]

    def iter_converted(self, dtype: str, chunk: int = CHUNK_BYTES) -> Iterator[Chunk]:
        """Yield the numbers in ``dtype``, rounded once; see :meth:`TensorSource.iter_converted`."""
        for values in self.rows(chunk // 8, wide=True):
            self._require_numbers(values)
            with self._fitting(dtype):
                yield from_float64(values.reshape(-1), dtype)

    def _require_numbers(self, values: Values) -> None:
        if not np.isfinite(values).all():
            raise self.not_finite()


def numbers_of(source: TensorSource, count: int, *, wide: bool) -> Iterator[Values]:
    """Yield the numbers of any tensor in order, flat, as float64 (``wide``) or float32.

    Args:
        source: the tensor.
        count: most numbers at a time, roughly.
        wide: as of :meth:`ComputedTensor.rows`.

    Raises:
        CorruptInputError: a number is not finite, or the file ended early.
    """
    if isinstance(source, ComputedTensor):
        for rows in source.rows(count, wide=wide):
            yield rows.reshape(-1)
        return
    for piece in source.iter_converted("F32", max(8, count * 4)):
        values = np.frombuffer(piece, "<f4")
        yield values.astype(np.float64) if wide else values


def whole_rows(pieces: Iterator[Values], columns: int, rows: int) -> Iterator[Values]:
    """Cut a flat stream of numbers into ``[rows, columns]``, the last piece with what is left.

    Raises:
        CorruptInputError: the stream ends inside a row.
    """
    wanted = columns * rows
    held: list[Values] = []
    size = 0
    for piece in pieces:
        size += piece.size
        if size < wanted:
            held.append(piece.copy())  # since a piece is valid until the next
            continue
        joined = np.concatenate([*held, piece]) if held else piece
        size %= wanted
        whole = joined.size - size
        for start in range(0, whole, wanted):
            yield joined[start : start + wanted].reshape(rows, columns)
        held = [joined[whole:].copy()] if size else []
    rest = np.concatenate(held) if held else np.empty(0, np.float32)
    if rest.size % columns:
        raise CorruptInputError("a tensor ended inside a row; restore its file and run again")
    if rest.size:
        yield rest.reshape(-1, columns)
