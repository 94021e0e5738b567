"""A tensor of a checkpoint that is read in chunks and never held."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from wanx.errors import CorruptInputError, UsageError
from wanx.files.floats import Chunk, convert_chunk, has_nonfinite
from wanx.files.input_file import open_input
from wanx.files.safetensors import TensorRef

CHUNK_BYTES = 1 << 20  # stays in a core's cache while it is checked, converted, hashed, written


@dataclass(frozen=True, kw_only=True)
class TensorSource(ABC):
    """One stored tensor.

    Attributes:
        name: name in its file.
        dtype: type as safetensors calls it, such as ``F32`` or ``BF16``.
        shape: sides, outermost first.
        nbytes: size of the little-endian data.
        file: the file it comes from.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that the tensor's bytes come from."""
        return (self.file,)

    @property
    def storage(self) -> str:
        """Type that it is stored in where an export keeps each tensor's own."""
        return self.dtype

    @property
    def stored_bytes(self) -> int:
        """Size of what files hold for it."""
        return self.nbytes

    @property
    def position(self) -> int:
        """Place in its file, to read tensors in the order in which they lie there."""
        return 0

    @abstractmethod
    def iter_bytes(self, chunk: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """Yield the raw bytes in order; each piece is valid until the next is drawn.

        Args:
            chunk: largest size of a piece in bytes; a multiple of 8 keeps elements whole.

        Raises:
            CorruptInputError: the file ended early.
        """

    def require_finite(self, piece: Chunk) -> None:
        """Refuse a piece of this tensor that holds NaN or infinity.

        Raises:
            CorruptInputError: it does.
        """
        if has_nonfinite(piece, self.dtype):
            raise self.not_finite()

    def not_finite(self) -> CorruptInputError:
        """Error for a number that is NaN or infinity."""
        return CorruptInputError(
            f"{self.file}: tensor {self.name!r} holds NaN or infinity; download the file "
            "again or use another checkpoint"
        )

    def iter_converted(self, dtype: str, chunk: int = CHUNK_BYTES) -> Iterator[Chunk]:
        """Yield the bytes converted to ``dtype``, refusing NaN and infinity.

        Args:
            dtype: ``F32``, ``F16`` or ``BF16``.
            chunk: as in :meth:`iter_bytes`, of the stored type.

        Raises:
            CorruptInputError: a number is not finite, or the file ended early.
            UsageError: a number is too large for ``dtype``.
        """
        for piece in self.iter_bytes(chunk):
            self.require_finite(piece)
            with self._fitting(dtype):
                converted = convert_chunk(piece, self.dtype, dtype)
            yield converted

    @contextmanager
    def _fitting(self, dtype: str) -> Iterator[None]:
        """Refuse what is too large for a type."""
        try:
            yield
        except OverflowError as error:
            raise UsageError(
                f"{self.file}: tensor {self.name!r} does not fit {dtype}: {error}; export at "
                "another precision, such as bf16"
            ) from None


@dataclass(frozen=True, kw_only=True)
class FileTensor(TensorSource):
    """A byte range of a file.

    Attributes:
        offset: of the first byte.
    """

    offset: int

    @property
    def position(self) -> int:
        """The offset."""
        return self.offset

    def iter_bytes(self, chunk: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """Yield the bytes from one buffer that is filled again for each piece."""
        buffer = memoryview(bytearray(min(chunk, self.nbytes)))
        with open_input(self.file) as file:
            file.seek(self.offset)
            left = self.nbytes
            while left:
                piece = buffer[: min(chunk, left)]
                if file.readinto(piece) != len(piece):
                    raise CorruptInputError(
                        f"{self.file} ended inside tensor {self.name!r}; it was cut while being "
                        "read, so restore it and run again"
                    )
                left -= len(piece)
                yield piece


@dataclass(frozen=True, kw_only=True)
class SafetensorsTensor(FileTensor):
    """A byte range of a safetensors file."""

    @classmethod
    def from_ref(cls, ref: TensorRef) -> SafetensorsTensor:
        """Make the source that a header's entry describes."""
        return cls(
            name=ref.name,
            dtype=ref.dtype,
            shape=ref.shape,
            nbytes=ref.nbytes,
            file=ref.file,
            offset=ref.offset,
        )


@dataclass(frozen=True, kw_only=True)
class JoinedTensor(TensorSource):
    """Tensors of one type behind each other along their first axis, which is how bytes lie."""

    parts: tuple[TensorSource, ...]

    @classmethod
    def of(cls, *parts: TensorSource) -> JoinedTensor:
        """Join ``parts``, in order.

        Raises:
            CorruptInputError: they differ in type, or in another side than the first.
        """
        first, name = parts[0], " + ".join(part.name for part in parts)
        if len({(part.dtype, len(part.shape), part.shape[1:]) for part in parts}) > 1 or not all(
            part.shape for part in parts
        ):
            descriptions = ", ".join(f"{part.dtype} {list(part.shape)}" for part in parts)
            raise CorruptInputError(
                f"{first.file}: the tensors {name} are {descriptions} and do not make one; "
                "download the file again"
            )
        return cls(
            name=name,
            dtype=first.dtype,
            shape=(sum(part.shape[0] for part in parts), *first.shape[1:]),
            nbytes=sum(part.nbytes for part in parts),
            file=first.file,
            parts=parts,
        )

    @property
    def position(self) -> int:
        """Place of the first part."""
        return self.parts[0].position

    @property
    def storage(self) -> str:
        """Type that the first part is stored in."""
        return self.parts[0].storage

    @property
    def stored_bytes(self) -> int:
        """Size of what files hold for all parts."""
        return sum(part.stored_bytes for part in self.parts)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of all parts."""
        return tuple(dict.fromkeys(file for part in self.parts for file in part.files))

    def iter_bytes(self, chunk: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """Yield the bytes of each part in turn."""
        for part in self.parts:
            yield from part.iter_bytes(chunk)

    def iter_converted(self, dtype: str, chunk: int = CHUNK_BYTES) -> Iterator[Chunk]:
        """Convert each part in turn, so that errors name the part that was refused."""
        for part in self.parts:
            yield from part.iter_converted(dtype, chunk)
