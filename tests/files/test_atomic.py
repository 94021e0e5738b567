"""Files that are replaced in one step, and those of the cache."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from wanx.files.atomic import replacing
from wanx.files.cache import cache_path, read_cached, write_cached


@pytest.mark.parametrize("name", ["report.json", "Bericht ü.html", "a" * 255])
def test_a_file_is_replaced_at_the_end(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("written", [True, False])
def test_an_error_leaves_the_old_file_alone(tmp_path: Path, written: bool) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as temporary:
            if written:
                temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]


def test_writers_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "cache"

    def write(letter: bytes) -> None:
        for _ in range(20):
            write_cached(path, letter * 100_000)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in (b"a" * 100_000, b"b" * 100_000)
    assert os.listdir(tmp_path) == ["cache"]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    write_cached(tmp_path / "file" / "below", b"data")
    write_cached(None, b"data")
    assert read_cached(tmp_path / "file" / "below") == b""
    assert read_cached(None) == b""


def test_without_a_home_folder_there_is_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_path("verified", "x") is not None
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert cache_path("verified", "x") is None
