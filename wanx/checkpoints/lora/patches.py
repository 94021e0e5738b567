"""Patches of LoRA files: what is added to the numbers of a tensor, row by row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wanx.checkpoints.tensors.computed import ComputedTensor, Values, numbers_of, whole_rows
from wanx.checkpoints.tensors.source import CHUNK_BYTES, TensorSource

_ROWS = 256  # of a product at a time: the narrow matrix is read for each anew


@dataclass(frozen=True, kw_only=True)
class Patch(ABC):
    """Something that a LoRA file does to a tensor.

    Attributes:
        factor: that it is multiplied by, the strength among others.
    """

    factor: float

    @property
    @abstractmethod
    def sources(self) -> tuple[TensorSource, ...]:
        """Tensors of the file that it reads."""


@dataclass(frozen=True, kw_only=True)
class LowRank(Patch):
    """A product of two narrow matrices, ``up [out, r] @ down [r, in]``."""

    up: TensorSource
    down: TensorSource

    @property
    def sources(self) -> tuple[TensorSource, ...]:
        """Both matrices."""
        return self.up, self.down

    def matrices(self, columns: int) -> tuple[Values, Values]:
        """Read both, the first times the factor."""
        rank = self.down.shape[0]
        up = _array(self.up).reshape(-1, rank) * self.factor
        return up, _array(self.down).reshape(rank, columns)


@dataclass(frozen=True, kw_only=True)
class Difference(Patch):
    """A tensor of the same size."""

    source: TensorSource

    @property
    def sources(self) -> tuple[TensorSource, ...]:
        """The tensor."""
        return (self.source,)

    def added(self, columns: int, rows: int) -> Iterator[Values]:
        """Yield what is added, in float64, in pieces of ``[rows, columns]``."""
        pieces = numbers_of(self.source, columns * rows, wide=True)
        for piece in whole_rows(pieces, columns, rows):
            yield piece * self.factor


@dataclass(frozen=True, kw_only=True)
class FusedTensor(ComputedTensor):
    """A tensor with patches in it: ``W + sum of what each adds``.

    Attributes:
        base: the tensor without them; in its place what a file sets instead.
        patches: in the order in which they were given.
    """

    base: TensorSource
    patches: tuple[Patch, ...]

    @classmethod
    def of(cls, base: TensorSource, patches: tuple[Patch, ...]) -> FusedTensor:
        """Put patches into a tensor."""
        count = int(np.prod(base.shape, dtype=np.int64))
        return cls(
            name=base.name, dtype="F32", shape=base.shape, nbytes=4 * count, file=base.file,
            kept=base.storage, base=base, patches=patches,
        )  # fmt: skip

    @property
    def files(self) -> tuple[Any, ...]:
        """The files of the tensor and of its patches."""
        sources = (self.base, *(source for patch in self.patches for source in patch.sources))
        return tuple(dict.fromkeys(file for source in sources for file in source.files))

    @property
    def position(self) -> int:
        """Place of the tensor without patches."""
        return self.base.position

    @property
    def stored_bytes(self) -> int:
        """Size of the tensor without patches."""
        return self.base.stored_bytes

    def rows(self, numbers: int, *, wide: bool) -> Iterator[Values]:
        """Add the patches, all of it in float64: sums may cancel, and the error would be seen.

        Each piece is valid until the next is drawn.
        """
        height = self.rows_at_once(numbers)
        base = whole_rows(numbers_of(self.base, numbers, wide=True), self.columns, height)
        low_rank = [patch for patch in self.patches if isinstance(patch, LowRank)]
        # On another core than what reads and rounds the weights.
        added = [_ahead(_product(low_rank, self.columns))] if low_rank else []
        added += [p.added(self.columns, height) for p in self.patches if isinstance(p, Difference)]
        for total, *others in _alike(added, base):
            for other in others:
                total += other
            yield total if wide else total.astype(np.float32)


def _alike(added: list[Iterator[Values]], base: Iterator[Values]) -> Iterator[list[Values]]:
    """Cut streams of rows at the same places; what is added comes first, and ends with the base."""
    streams = [*added, base]
    held = [next(stream) for stream in streams]
    while True:
        height = min(len(piece) for piece in held)
        yield [piece[:height] for piece in held]
        for number, stream in enumerate(streams):
            held[number] = held[number][height:]
            if not len(held[number]):
                piece = next(stream, None)
                if piece is None:
                    return
                held[number] = piece


def _product(patches: list[LowRank], columns: int) -> Iterator[Values]:
    """Yield the sum of several products as one, of matrices beside and below each other.

    Pieces take turns in two places, since the system clears fresh memory slower than a core
    multiplies: each is valid until the one after the next is drawn.
    """
    ups, downs = zip(*(patch.matrices(columns) for patch in patches), strict=True)
    up, down = np.concatenate(ups, axis=1), np.concatenate(downs)
    places = np.empty((2, min(_ROWS, len(up)), columns))
    for turn, start in enumerate(range(0, len(up), _ROWS)):
        part = up[start : start + _ROWS]
        yield np.matmul(part, down, out=places[turn % 2, : len(part)])


def _ahead(pieces: Iterator[Values]) -> Iterator[Values]:
    """Compute each piece in a thread while the one before it is used."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        coming = thread.submit(next, pieces, None)
        while (piece := coming.result()) is not None:
            coming = thread.submit(next, pieces, None)
            yield piece


def _array(source: TensorSource) -> NDArray[np.float64]:
    return np.concatenate(list(numbers_of(source, CHUNK_BYTES, wide=True)))
