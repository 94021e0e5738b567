"""Metadata that says how to make a video again: one JSON object in the comment of the file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from wanx.errors import CorruptInputError, UsageError
from wanx.runtime.output.checks import resolve_output

PNG_KEYWORD = "Comment"
_GIF_LOOP = b"!\xff\x0bNETSCAPE2.0"
_GIF_LOOP_SIZE = 19


def to_comment(metadata: Mapping[str, str]) -> str:
    """Make the comment that ``read_metadata`` turns back into ``metadata``; empty for nothing.

    Raises:
        UsageError: A value holds lone surrogates, which no container can store.
    """
    comment = json.dumps(dict(metadata), ensure_ascii=False) if metadata else ""
    try:
        comment.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"the metadata of the video is not valid UTF-8: {error.reason}") from None
    return comment


def insert_gif_comment(path: Path, comment: str) -> None:
    """Add a comment extension to a GIF that FFmpeg wrote: its muxer has no option for one.

    It goes before the first frame, where readers look that do not walk the whole file, but after
    the loop extension, which old players expect right behind the colour table.
    """
    data = path.read_bytes()
    flags = data[10]
    at = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    if data.startswith(_GIF_LOOP, at):
        at += _GIF_LOOP_SIZE
    text = comment.encode("utf-8")
    parts = (text[i : i + 255] for i in range(0, len(text), 255))
    blocks = b"".join(bytes([len(part)]) + part for part in parts)
    with open(path, "r+b") as stream:
        stream.seek(at)
        stream.write(b"!\xfe" + blocks + b"\0" + data[at:])


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the metadata of a video or image that wanx wrote; empty if it has none.

    Raises:
        UsageError: There is no such file, or its extension is unknown.
        CorruptInputError: The file cannot be read as what its extension says.
    """
    import av
    from PIL import Image

    target = resolve_output(path)
    if not target.is_file():
        raise UsageError(f"there is no file {path}; check the name")
    suffix = target.suffix.lower()
    try:
        if suffix in (".gif", ".png"):
            with Image.open(target, formats=[suffix[1:]]) as image:
                comment = image.info.get("comment" if suffix == ".gif" else PNG_KEYWORD, "")
        else:
            # A named demuxer, because guessing would let a playlist called .mp4 open other files.
            with av.open(str(target), format=suffix[1:], metadata_errors="replace") as container:
                tags = {key.lower(): value for key, value in container.metadata.items()}
                comment = tags.get("comment", "")
    except (OSError, ValueError, SyntaxError, av.FFmpegError, Image.DecompressionBombError) as bad:
        reason = str(bad).splitlines()[0]
        raise CorruptInputError(
            f"{path} cannot be read as {suffix[1:]}: {reason}; generate it again"
        ) from None
    try:
        metadata = json.loads(comment)
    except ValueError:
        return {}
    if not isinstance(metadata, dict):
        return {}
    return {key: value for key, value in metadata.items() if isinstance(value, str)}
