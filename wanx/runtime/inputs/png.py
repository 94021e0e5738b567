"""Reader of PNG's chunks, which leaves out what is not needed to show the picture."""

from __future__ import annotations

import io
import struct
import zlib
from io import BufferedReader

# An animation's first frame, or the picture that stands for it, is in IDAT too.
_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
# Of the rest only the orientation matters, which has stood in all of these.
_ORIENTATION_KEYS = {b"XML:com.adobe.xmp", b"Raw profile type exif"}
_MAX_METADATA = 1 << 20
_MAX_METADATA_CHUNKS = 8


def without_metadata(file: BufferedReader, max_pixels: int) -> io.BytesIO:
    """Copy a PNG without the chunks that say nothing about its pixels or their orientation.

    Colour profiles, texts and animations are left out unread, however large or damaged they are.
    What is damaged or missing otherwise is so in the copy.

    Args:
        file: At the beginning of the signature.
        max_pixels: Size above which an image is refused; no more is copied than it can need.
    """
    copy = io.BytesIO()
    copy.write(file.read(8))
    available = 1 << 20
    metadata = 0
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind in _PIXELS and length <= available:
            body = file.read(length + 4)
            copy.write(head + body)
            available -= len(body)
            if kind == b"IHDR":
                width, height = struct.unpack(">II", body[:8].ljust(8, b"\0"))
                # 8 bytes a pixel at most, and one a row or three if it is interlaced. Deflate adds
                # less than a thousandth.
                available += 12 * min(width * height, max_pixels)
            if kind == b"IEND" or len(body) < length + 4:
                break
        elif not kind.isalpha():  # no chunk: the decoder decides whether all pixels are there
            copy.write(head)
            break
        elif kind in _PIXELS or length > _MAX_METADATA or metadata == _MAX_METADATA_CHUNKS:
            file.seek(length + 4, io.SEEK_CUR)
        elif _is_orientation(kind, body := file.read(length), file.read(4)):
            copy.write(head + body + struct.pack(">I", zlib.crc32(kind + body)))
            metadata += 1
    copy.seek(0)
    return copy


def _is_orientation(kind: bytes, body: bytes, checksum: bytes) -> bool:
    """Tell a sound chunk that may hold the orientation and does not unpack to too much."""
    if checksum != struct.pack(">I", zlib.crc32(kind + body)):
        return False
    if kind == b"eXIf":
        return True
    key, _, text = body.partition(b"\0")
    if key not in _ORIENTATION_KEYS:
        return False
    if kind == b"zTXt":
        return text[:1] == b"\0" and _unpacks(text[1:])
    if kind == b"iTXt":
        is_plain = text[:1] == b"\0"
        return is_plain or _unpacks(text[2:].split(b"\0", 2)[-1])
    return kind == b"tEXt"


def _unpacks(data: bytes) -> bool:
    unpacker = zlib.decompressobj()
    try:
        unpacker.decompress(data, _MAX_METADATA)
    except zlib.error:
        return False
    return not unpacker.unconsumed_tail
