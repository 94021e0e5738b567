"""JSON files that people write or download."""

from __future__ import annotations

from pathlib import Path

import pytest

from wanx.errors import CorruptInputError
from wanx.files.input_file import parse_json_object, read_json_object


def test_a_byte_order_mark_before_a_config_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"dim": 8}')
    assert read_json_object(path) == {"dim": 8}


@pytest.mark.parametrize("data", [b'\xef\xbb\xbf\xef\xbb\xbf{"dim": 8}', b"\xef\xbb\xbf", b""])
def test_a_byte_order_mark_is_no_json(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(CorruptInputError, match="cannot read its JSON"):
        read_json_object(path)


@pytest.mark.parametrize("data", [b"{", b"[1]", b'{"a": 1, "a": 2}', b"NaN", b"\xff", b"[" * 9999])
def test_what_to_do_is_that_of_the_caller(data: bytes) -> None:
    for remedy in ("download the file again", "correct the line"):
        with pytest.raises(CorruptInputError) as caught:
            parse_json_object(data, Path("x.json"), remedy=remedy)
        assert str(caught.value).startswith("x.json: cannot read its JSON: ")
        assert str(caught.value).endswith(f"; {remedy}")


def test_where_the_text_is_wrong() -> None:
    for data, position in (
        (b'{"a": }', "value at column 7"),
        (b'{"a": "', "starting at column 7"),
        (b'{\n"a": }', "value at line 2 column 6"),
    ):
        with pytest.raises(CorruptInputError, match=position):
            parse_json_object(data, Path("x.json"))
