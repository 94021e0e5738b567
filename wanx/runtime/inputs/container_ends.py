"""Ends that video containers claim for themselves, in bytes, to tell files that were cut off."""

from __future__ import annotations

import os
from io import BufferedReader


def mov_end(file: BufferedReader, size: int) -> int:
    """End of the last box with frames or their index; boxes are length, kind, contents."""
    at = end = 0
    while at + 8 <= size:
        file.seek(at)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if length < 8:  # 0 is a box that reaches to the end of the file
            break
        at += length
        if head[4:8] in (b"moov", b"mdat", b"moof"):
            end = at
    return end


def matroska_end(head: bytes) -> int:
    """End of the one segment behind the EBML header; 0 if it was streamed with unknown length."""

    def skip_number(at: int) -> tuple[int, int]:
        first = head[at] if at < len(head) else 0
        width = 9 - first.bit_length()  # leading zeros count the bytes that follow
        ones = (1 << 7 * width) - 1
        number = int.from_bytes(head[at : at + width], "big") & ones
        return at + width, 0 if number == ones else number

    at, length = skip_number(4)
    at, length = skip_number(at + length + 4)
    return at + length if length else 0


def gif_end(file: BufferedReader, head: bytes) -> int:
    """End of the trailer, or one byte more than there are if the file ends without one."""

    def skip_table(flags: int) -> None:
        file.seek(3 << (flags & 7) + 1 if flags & 0x80 else 0, os.SEEK_CUR)

    file.seek(13)
    skip_table(head[10])
    while (block := file.read(1)) in (b"!", b","):
        if block == b",":
            skip_table((file.read(9) or b"\0")[-1])
        file.seek(1, os.SEEK_CUR)  # label of an extension, code size of an image
        while any(length := file.read(1)):
            file.seek(length[0], os.SEEK_CUR)
    return file.tell() if block else os.fstat(file.fileno()).st_size + 1
