"""Checks, before any computation, that the output can be written where the user wants it."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from wanx.errors import UsageError, WanxError

# Bytes per pixel of each format: twice a detailed scene at quality 8 for the two video codecs, and
# a GIF or PNG that hardly compresses.
BYTES_PER_PIXEL = {".mp4": 0.5, ".webm": 0.5, ".gif": 1.0, ".png": 3.0}
MAX_NAME_BYTES = 255  # of the file systems in use; they are asked for their own limit too
_TEMPORARY_NAME_BYTES = len(".wanx-.tmp") + 32
_OVERHEAD = 2**20


def resolve_output(path: str | os.PathLike[str]) -> Path:
    """Turn the name of an output into an absolute path that no media library can misread.

    FFmpeg reads ``concat:a.mp4`` or ``http://…`` as a protocol and tools read ``-y.mp4`` as an
    option; an absolute path is neither.

    Raises:
        UsageError: The name looks like a protocol, holds a NUL character or half a surrogate, or
            its extension is not one of ``BYTES_PER_PIXEL``.
        WanxError: It is relative to a working folder that is gone.
    """
    if not isinstance(path, (str, os.PathLike)) or not isinstance(name := os.fspath(path), str):
        raise UsageError(f"the output is {path!r:.80}; give the name of a file")
    if "\0" in name:
        raise UsageError(f"the output name {name!r} holds a NUL character; remove it")
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        raise UsageError(
            f"the output name {name!a} has characters that no file name can have; choose another"
        ) from None
    if ":" in os.path.splitdrive(name)[1].split("/")[0]:
        raise UsageError(
            f"the output name {name!r} looks like a URL or protocol and only files are written; "
            f"for a file of that name write ./{name}"
        )
    folder, file = os.path.split(name)
    if os.path.splitext(file)[1].lower() not in BYTES_PER_PIXEL:
        raise UsageError(
            f"the output {name!r} has no known extension; use one of {', '.join(BYTES_PER_PIXEL)}"
        )
    try:
        return Path(os.path.realpath(folder or "."), file)
    except OSError as error:
        raise WanxError(
            f"the working folder cannot be used ({error.strerror}): go to another one, or give "
            f"the whole path of {name!r}"
        ) from None


def check_output(
    path: str | os.PathLike[str], *, width: int, height: int, frames: int, overwrite: bool = False
) -> Path:
    """Check that a video of this size can be written to ``path``.

    Args:
        path: The name the user gave.
        width: Pixels.
        height: Pixels.
        frames: How many frames will be written.
        overwrite: Whether a file of that name may be replaced.

    Returns:
        The absolute path.

    Raises:
        UsageError: The name is refused by ``resolve_output`` or too long, the folder is missing or
            cannot be written to, something is in the way, or a ``.png`` is to hold several frames.
        WanxError: The disk is too full for the size to expect.
    """
    target = resolve_output(path)
    suffix = target.suffix.lower()
    if suffix == ".png" and frames > 1:
        raise UsageError(f"{path} can hold one frame, not {frames}; use .mp4, .webm or .gif")
    _check_length(target)
    if not target.parent.is_dir():
        raise UsageError(f"the folder {target.parent} does not exist; create it first")
    if os.path.lexists(target):
        if not target.is_file():
            raise UsageError(f"{path} exists and is not a regular file; choose another name")
        if not overwrite:
            raise UsageError(f"{path} exists; choose another name or allow overwriting")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
        free = shutil.disk_usage(target.parent).free
    except OSError as error:
        raise UsageError(
            f"cannot write to the folder {target.parent}: {error.strerror}; choose another"
        ) from None
    expected = int(BYTES_PER_PIXEL[suffix] * width * height * frames) + _OVERHEAD
    if free < expected:
        raise WanxError(
            f"{target.parent} has {free / 1e6:.1f} MB free and {path} may need "
            f"{expected / 1e6:.1f} MB; free some space or choose another folder"
        )
    return target


def _check_length(target: Path) -> None:
    name_bytes, path_bytes = len(os.fsencode(target.name)), len(os.fsencode(target))
    try:
        most_name = os.pathconf(target.parent, "PC_NAME_MAX")
        most_path = os.pathconf(target.parent, "PC_PATH_MAX")
    except (AttributeError, OSError, ValueError):  # Windows has none, some file systems no answer
        most_name, most_path = MAX_NAME_BYTES, 4096
    if name_bytes > most_name:
        raise UsageError(
            f"the output name {target.name[:40]!r}… is {name_bytes} bytes long; the folder "
            f"{target.parent} takes {most_name} at most"
        )
    # The hidden file that is written first may have a longer name.
    most_path -= 1 + max(0, _TEMPORARY_NAME_BYTES - name_bytes)
    if path_bytes > most_path:
        raise UsageError(
            f"the output {str(target)[:40]!r}… is {path_bytes} bytes long with its folder; choose "
            f"{most_path} at most"
        )
