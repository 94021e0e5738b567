"""Write a group of weights into the bundle, one chunk at a time."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from wanx.checkpoints.tensors.source import SafetensorsTensor, TensorSource
from wanx.config.number_formats import BY_SAFETENSORS
from wanx.exporter.options import ResolvedExport
from wanx.files.checksum import sha256_file
from wanx.files.hashing import CopiedFile
from wanx.files.input_file import open_input
from wanx.files.safetensors import SafetensorsHeader, SafetensorsWriter, TensorRef, read_header

_PIECE_BYTES = 32 << 20

OnBytes = Callable[[int], None]
TensorRow = tuple[str, str, TensorSource]  # original name, stored type, where it comes from


@dataclass
class WrittenWeights:
    """The weight files of one group.

    Attributes:
        tensors: location of every tensor, by its original name.
        sha256: digest of every file, hex.
        source_sha256: digests of the files that the weights came from.
        kept: 8-bit weights that are the checkpoint's own, in a group that is quantised.
    """

    tensors: dict[str, TensorRef] = field(default_factory=dict)
    sha256: dict[Path, str] = field(default_factory=dict)
    source_sha256: dict[Path, str] = field(default_factory=dict)
    kept: int = 0


def write_weights(
    resolved: ResolvedExport, group: str, folder: Path, on_bytes: OnBytes
) -> WrittenWeights:
    """Stream the weights of ``group`` into ``folder``, unquantised; see :func:`write_tensors`."""
    tensors = resolved.checkpoint.components[group].tensors
    return write_tensors(resolved, group, tensors, folder, on_bytes)


def write_tensors(
    resolved: ResolvedExport,
    group: str,
    sources: Mapping[str, TensorSource],
    folder: Path,
    on_bytes: OnBytes,
) -> WrittenWeights:
    """Stream tensors into ``folder``.

    A safetensors file that already has the right names and types is copied as it is, so its
    SHA-256 is still the published one. Everything else goes into one new file, each tensor with
    its own bytes unless the export converts it.

    Args:
        resolved: the export.
        group: ``dit``, ``text_encoder``, ``image_encoder`` or ``vae``.
        sources: all tensors of the group.
        folder: where ``<group>.safetensors`` or ``<group>-00001-of-00007.safetensors``
            are created.
        on_bytes: told how many bytes of tensors were written, in portions.

    Raises:
        CorruptInputError: a source file is cut, or holds NaN or infinity.
        UsageError: a number is too large for the type to store.
        WanxError: the disk is full, or a file cannot be read or written.
    """
    by_file: dict[Path, list[TensorRow]] = {}
    for name, source in sources.items():
        row = (name, resolved.stored_type(group, source), source)
        by_file.setdefault(source.file, []).append(row)
    unchanged = [file for file, rows in by_file.items() if _is_unchanged(file, rows)]
    rewritten = [row for file, rows in by_file.items() if file not in unchanged for row in rows]
    count = len(unchanged) + bool(rewritten)
    names = iter(
        f"{group}.safetensors" if count == 1 else f"{group}-{i:05d}-of-{count:05d}.safetensors"
        for i in range(1, count + 1)
    )
    written = WrittenWeights()
    for file in unchanged:
        _copy(file, folder / next(names), written, on_bytes)
    if rewritten:
        _rewrite(rewritten, folder / next(names), written, on_bytes)
    return written


def _is_unchanged(file: Path, rows: list[TensorRow]) -> bool:
    return all(
        isinstance(source, SafetensorsTensor) and source.name == name and source.dtype == stored
        for name, stored, source in rows
    ) and len(rows) == len(read_header(file).entries)


def _copy(file: Path, path: Path, written: WrittenWeights, on_bytes: OnBytes) -> None:
    """Let the kernel copy a file, one piece ahead of a thread that hashes it and looks for NaN.

    In step, because a file that outgrows the page cache would otherwise be read twice; and ahead,
    because the kernel reads faster for itself than for a mapping.
    """
    header = read_header(file)
    digest = hashlib.sha256()
    with (
        CopiedFile(file, path, header.size) as copy,
        ThreadPoolExecutor(max_workers=1) as checker,
        open_input(file) as source,
        # Mapped, so that the pages which the kernel copied are hashed where they are.
        mmap.mmap(source.fileno(), header.size, access=mmap.ACCESS_READ) as mapped,
    ):
        checking: Future[None] | None = None
        try:
            for piece in _pieces(header):
                copy.copy(piece.stop - piece.start)
                on_bytes(piece.stop - piece.start)
                if checking is not None:
                    checking.result()
                checking = checker.submit(piece.check, mapped, digest)
            if checking is not None:
                checking.result()
        finally:
            checker.shutdown()  # before the mapping is closed
    written.tensors |= {n: replace(ref, file=path) for n, ref in header.entries.items()}
    written.sha256[path] = written.source_sha256[file] = digest.hexdigest()


@dataclass(frozen=True)
class _Piece:
    """Bytes of a file; ``source`` is the tensor that they belong to, None for the header."""

    start: int
    stop: int
    source: SafetensorsTensor | None

    def check(self, mapped: mmap.mmap, digest: hashlib._Hash) -> None:
        """Hash the bytes, refusing NaN."""
        with memoryview(mapped) as data, data[self.start : self.stop] as piece:
            if self.source is not None:
                self.source.require_finite(piece)
            digest.update(piece)


def _pieces(header: SafetensorsHeader) -> Iterator[_Piece]:
    """A file from start to end; large, as each piece asks for the interpreter lock."""
    refs = sorted(header.entries.values(), key=lambda ref: ref.offset)
    yield _Piece(0, refs[0].offset if refs else header.size, None)
    for ref in refs:
        source, end = SafetensorsTensor.from_ref(ref), ref.offset + ref.nbytes
        for start in range(ref.offset, end, _PIECE_BYTES):
            yield _Piece(start, min(start + _PIECE_BYTES, end), source)


def _rewrite(rows: list[TensorRow], path: Path, written: WrittenWeights, on_bytes: OnBytes) -> None:
    # A tensor must start at a multiple of its width, so wider types go first; then disk order.
    rows.sort(key=lambda row: (-_bits(row[1]), str(row[2].file), row[2].position))
    narrowest = {file: _bits(stored) for _, stored, source in rows for file in source.files}
    hashes: dict[Path, Future[str]] = {}
    with ThreadPoolExecutor(max_workers=1) as hasher:
        header = [(name, stored, source.shape) for name, stored, source in rows]
        try:
            with SafetensorsWriter(path, header) as writer:
                for _, stored, source in rows:
                    for file in source.files:
                        # Beside the conversion, while the file's pages are still in memory: so not
                        # before its last tensors, which are most of it where it is quantised.
                        if file not in hashes and _bits(stored) == narrowest[file]:
                            hashes[file] = hasher.submit(sha256_file, file)
                    for chunk in source.iter_converted(stored):
                        writer.write(chunk)
                        on_bytes(len(chunk))
            digests = {file: future.result() for file, future in hashes.items()}
        finally:
            hasher.shutdown(wait=True, cancel_futures=True)
    written.tensors |= writer.header.entries
    written.sha256[path] = writer.sha256
    written.source_sha256 |= digests


def _bits(stored: str) -> int:
    return BY_SAFETENSORS[stored].bits


def file_labels(files: Collection[Path]) -> dict[Path, str]:
    """Names of files, or where two have one name, their paths from the folder of all."""
    if len({file.name for file in files}) == len(files):
        return {file: file.name for file in files}
    root = os.path.commonpath(file.parent for file in files)
    return {file: file.relative_to(root).as_posix() for file in files}


def combined_sha256(digests: dict[str, str]) -> str:
    """One digest for several files: the hash of their sorted ``sha256sum`` lines."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
