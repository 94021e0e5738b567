"""Opening files that somebody else wrote: each failure is one line that names the file."""

from __future__ import annotations

import codecs
import json
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

from wanx.errors import CorruptInputError, WanxError

MAX_JSON_BYTES = 100_000_000
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def open_input(path: Path) -> BufferedReader:
    """Open a regular file for reading, positioned at its start.

    Raises:
        CorruptInputError: the file is missing, not a regular file, or a git-LFS pointer.
        WanxError: the operating system refuses to read it.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would hang
            raise CorruptInputError(
                f"{path} is not a regular file; put the file itself in its place"
            )
        file = path.open("rb")
        try:
            is_pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
            file.seek(0)
        except BaseException:
            file.close()
            raise
    except FileNotFoundError:
        raise CorruptInputError(f"{path} is missing; download the checkpoint again") from None
    except PermissionError:
        raise WanxError(f"cannot read {path}: permission denied; make it readable") from None
    except OSError as error:
        raise WanxError(
            f"cannot read {path}: {error.strerror}; check the path and the disk"
        ) from None
    if is_pointer:
        file.close()
        raise CorruptInputError(
            f"{path} is a git-LFS pointer, not the data it stands for; run `git lfs pull`"
        )
    return file


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; see :func:`parse_json_object`.

    A byte order mark before it is skipped: editors of people who correct a config write one.

    Raises:
        CorruptInputError: the file cannot be opened, is above 100 MB, or is not such an object.
    """
    with open_input(path) as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise CorruptInputError(f"{path} is larger than {MAX_JSON_BYTES} bytes; it is not a config")
    return parse_json_object(data.removeprefix(codecs.BOM_UTF8), path)


def parse_json_object(
    data: bytes, path: Path, *, remedy: str = "download the file again"
) -> dict[str, Any]:
    """Parse one strict JSON object: UTF-8, no duplicate keys, no NaN, no lone surrogates.

    Args:
        data: the text.
        path: the file named in errors.
        remedy: end of the errors; a file that the user wrote cannot be downloaded again.

    Raises:
        CorruptInputError: the text is anything else.
    """

    def not_json(reason: str) -> CorruptInputError:
        return CorruptInputError(f"{path}: cannot read its JSON: {reason}; {remedy}")

    try:
        value = json.loads(
            data.decode(),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_int=_parse_integer,
        )
    except RecursionError:
        raise not_json("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        raise not_json(f"{error.msg.removesuffix(' at')} at {line}column {error.colno}") from None
    except ValueError as error:
        raise not_json(str(error)) from None
    if not isinstance(value, dict):
        raise not_json(f"found a JSON {type(value).__name__} instead of an object")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"key {key[:80]!r} appears twice")
        key.encode()  # a lone surrogate cannot be written back or printed
        values[key] = value
    return values


def _parse_integer(digits: str) -> int:
    if len(digits) > 20:  # longer than 64 bits
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
