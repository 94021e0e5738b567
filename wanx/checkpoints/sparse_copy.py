"""Copies of weight files that hold headers alone, so that a checkpoint is checked before it comes.

Such a file has its whole size, and zeros where the tensors are; file systems store no zeros. What
reads names, shapes, types and small tensors about them reads it as it would the whole file.
"""

from __future__ import annotations

import os
import re
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

from wanx.checkpoints.tensors.gguf_header import MAGIC, read_gguf_header
from wanx.checkpoints.weights import PICKLES
from wanx.errors import CorruptInputError
from wanx.files.safetensors import MAX_HEADER_BYTES, read_header

_SMALL_FILE = 1 << 20  # copied whole, as configs and indices are
_TENSOR = re.compile(r".*/data/\d+")  # entry of a PyTorch archive
# About other tensors, and read before them; ``comfy_quant`` is JSON.
_TOLD = (".comfy_quant", "scaled_fp8")
_MAX_ENTRY = 1 << 27
_LOCAL_HEADER = struct.Struct("<IHHHHHIIIHH")
_ALIGNMENT = 64  # of PyTorch's tensors in an archive


def sparse_copy(remote: BinaryIO, size: int, target: Path) -> None:
    """Copy what tells about the tensors of a file.

    Args:
        remote: the file, which is read in parts.
        size: of it in bytes.
        target: file to write, with the same suffix.

    Raises:
        CorruptInputError: the file is damaged.
    """
    with target.open("wb") as copy:
        copy.truncate(size)
        if target.suffix in PICKLES:
            _copy_archive(remote, copy, str(target.name))
        elif target.suffix == ".json" and size > _SMALL_FILE and target.stem == "tokenizer":
            return
        elif target.suffix in (".safetensors", ".sft", ".gguf"):
            _copy_header(remote, copy, target, size)
        elif size <= _SMALL_FILE or target.suffix == ".json":
            copy.write(remote.read(size))


def _copy_header(remote: BinaryIO, copy: BinaryIO, target: Path, size: int) -> None:
    start = remote.read(8)
    remote.seek(0)
    if start.startswith(MAGIC):
        end = read_gguf_header(remote, target.name).data_start
        _copy_range(remote, copy, 0, min(end, size))
        return
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER_BYTES or 8 + length > size:
        return  # its reader says what is wrong
    _copy_range(remote, copy, 0, 8 + length)
    copy.flush()
    for ref in read_header(target).entries.values():
        if ref.name.endswith(_TOLD):
            _copy_range(remote, copy, ref.offset, ref.nbytes)


def _copy_archive(remote: BinaryIO, copy: BinaryIO, name: str) -> None:
    """Copy an archive's directory, its pickle and what is small, and the headers of tensors."""
    try:
        with zipfile.ZipFile(remote) as archive:
            entries, directory = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, OSError, struct.error) as error:
        raise CorruptInputError(
            f"{name} is not a whole PyTorch archive ({error}); see if there is a .safetensors"
        ) from None
    _copy_range(remote, copy, directory, os.fstat(copy.fileno()).st_size - directory)
    for entry in entries:
        path = entry.filename.encode()
        begin = entry.header_offset
        if not _TENSOR.fullmatch(entry.filename):
            if entry.file_size > _MAX_ENTRY:
                raise CorruptInputError(f"{name}: {entry.filename} has {entry.file_size} bytes")
            # Behind the names come up to two alignments of padding.
            length = _LOCAL_HEADER.size + len(path) + 4 * _ALIGNMENT + entry.file_size
            _copy_range(remote, copy, begin, min(length, directory - begin))
        else:
            # Its padding is not known from the directory, but nothing reads its bytes.
            padding = -(begin + _LOCAL_HEADER.size + len(path)) % _ALIGNMENT
            header = _LOCAL_HEADER.pack(
                0x04034B50, 0, entry.flag_bits, entry.compress_type, 0, 0, entry.CRC,
                min(entry.compress_size, 0xFFFFFFFF), min(entry.file_size, 0xFFFFFFFF),
                len(path), padding,
            )  # fmt: skip
            copy.seek(begin)
            copy.write(header + path)


def _copy_range(remote: BinaryIO, copy: BinaryIO, begin: int, length: int) -> None:
    remote.seek(begin)
    copy.seek(begin)
    copy.write(remote.read(length))
