"""What ends a line of a prompts file, and what such a file may be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from wanx.errors import UsageError, WanxError
from wanx.runtime.prompt_lines import read_prompt_lines

# Everything that str.splitlines takes for the end of a line, and JSON and text editors do not.
SEPARATORS = ["\u2028", "\u2029", "\u0085", "\v", "\f", "\x1c", "\x1d", "\x1e"]


def read(path: Path, data: str | bytes) -> list[tuple[int, object]]:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return list(read_prompt_lines(path))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("separator", SEPARATORS[:3])
@pytest.mark.fault("odd separators in JSON Lines")
def test_a_separator_in_a_string_ends_no_line(tmp_path: Path, separator: str, end: str) -> None:
    prompts = [f"a red{separator}circle", "b"]
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    result = read(tmp_path / "p.jsonl", end.join([lines[0], "", lines[1], ""]))
    assert result == [(1, {"prompt": prompts[0]}), (3, {"prompt": prompts[1]})]


@pytest.mark.parametrize("separator", SEPARATORS)
def test_a_separator_in_plain_text_ends_no_prompt(tmp_path: Path, separator: str) -> None:
    result = read(tmp_path / "p.txt", f"a red{separator}circle\r\nb")
    assert result == [(1, {"prompt": f"a red{separator}circle"}), (2, {"prompt": "b"})]


@pytest.mark.parametrize("name", ["p.jsonl", "p.txt", "p"])
@pytest.mark.fault("odd separators in JSON Lines")
def test_a_byte_order_mark_is_skipped(tmp_path: Path, name: str) -> None:
    assert read(tmp_path / name, b'\xef\xbb\xbf{"prompt": "a"}') == [(1, {"prompt": "a"})]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_plain_text_has_a_prompt_a_line(tmp_path: Path, mark: bytes) -> None:
    data = mark + 'a cat\n\n  "a dog", 猫 \n[1]\n{'.encode()
    result = read(tmp_path / "p.TXT", data)
    assert result == [
        (number, {"prompt": prompt})
        for number, prompt in ((1, "a cat"), (3, '"a dog", 猫'), (4, "[1]"), (5, "{"))
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"prompt": "a"}]', "begins a JSON array"),
        ('\n [\n{"prompt": "a"},\n{"prompt": "b"}\n]', "begins a JSON array"),
        (json.dumps({"prompt": "a"}, indent=2), "over several lines"),
    ],
)
def test_json_of_another_kind_is_refused_as_a_whole(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        read(tmp_path / "p.jsonl", text)
    assert "one object a line" in str(caught.value)


@pytest.mark.parametrize("line", ["a cat", '{"prompt": "a",}', '{"prompt": "a"', '"a"', "NaN"])
def test_nobody_is_told_to_download_their_own_file(tmp_path: Path, line: str) -> None:
    good, (number, error) = read(tmp_path / "p.jsonl", '{"prompt": "a"}\n' + line)
    assert good == (1, {"prompt": "a"})
    assert number == 2
    assert isinstance(error, WanxError)
    assert "download" not in str(error)
    assert "line 1" not in str(error)
    assert "correct the line" in str(error)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "cp932"])
def test_other_encodings_are_named(tmp_path: Path, encoding: str) -> None:
    with pytest.raises(UsageError, match="not UTF-8 at byte"):
        read(tmp_path / "p.jsonl", '{"prompt": "猫"}'.encode(encoding))


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    for name in ("a" * 300, "a\0b"):
        with pytest.raises(UsageError, match="not there or not a file"):
            list(read_prompt_lines(tmp_path / name))
