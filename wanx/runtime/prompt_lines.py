"""Lines of a prompts file: JSON Lines, or plain text with a prompt a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wanx.config.bounds import MAX_PROMPTS
from wanx.errors import UsageError, WanxError
from wanx.files.input_file import open_input, parse_json_object

_MAX_BYTES = 64 << 20
_EXAMPLE = '{"prompt": "a cat"}'


def read_prompt_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | WanxError]]:
    """Read the lines of a prompts file that are not blank.

    Lines end at LF or CRLF alone: JSON allows U+2028, U+2029 and U+0085 inside strings. A byte
    order mark is skipped. A ``.txt`` that does not begin with an object has a prompt a line.

    Args:
        path: the file.

    Yields:
        The number of a line, from 1, and its object, or the error in it.

    Raises:
        UsageError: the file is missing, too large or long, not UTF-8 or empty, or JSON but not
            JSON Lines.
    """
    text = _read_text(path)
    lines = [
        (number, line.removesuffix("\r"))
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]
    if not lines:
        raise UsageError(f"{path} has no lines; write one object a line, such as {_EXAMPLE}")
    first = lines[0][1].strip()
    plain = path.suffix.lower() == ".txt" and not first.startswith("{")
    if not plain:
        _require_object_a_line(first, path)
    if len(lines) > MAX_PROMPTS:
        raise UsageError(
            f"{path} has {len(lines)} lines, and at most {MAX_PROMPTS} are read; split it"
        )
    for number, line in lines:
        yield number, {"prompt": line.strip()} if plain else _parse_line(line, path)


def _read_text(path: Path) -> str:
    if not _is_file(path):
        raise UsageError(f"{path} is not there or not a file; give a file with an object a line")
    with open_input(path) as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise UsageError(f"{path} has over {_MAX_BYTES >> 20} MB; split it into several files")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8") from None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def _require_object_a_line(first: str, path: Path) -> None:
    if first.startswith("["):
        kind = "begins a JSON array"
    elif first == "{":
        kind = "has a JSON object over several lines"
    else:
        return
    raise UsageError(
        f"{path} {kind}; write JSON Lines: one object a line, such as {_EXAMPLE}, without brackets "
        "around them or commas between them"
    )


def _parse_line(line: str, path: Path) -> dict[str, Any] | WanxError:
    remedy = f"correct the line, such as to {_EXAMPLE}; a file of plain prompts is named .txt"
    try:
        return parse_json_object(line.encode(), path, remedy=remedy)
    except WanxError as error:
        return error
