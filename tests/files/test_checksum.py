from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from wanx.files.checksum import DigestCache, sha256_file

CHUNK = 1 << 20


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "wanx" / "verified"


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7])
def test_sha256_file_equals_hashlib(tmp_path: Path, size: int) -> None:
    path = tmp_path / "f"
    path.write_bytes(os.urandom(size))
    seen: list[int] = []
    assert sha256_file(path, seen.append) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sum(seen) == size
    assert sha256_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def aged(path: Path, monkeypatch: pytest.MonkeyPatch) -> os.stat_result:
    """Status of a file that was written a minute ago, as far as the stamps can tell."""
    now = path.stat().st_ctime_ns + 60_000_000_000
    monkeypatch.setattr("wanx.files.checksum.time.time_ns", lambda: now)
    return path.stat()


def stamped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = folder / "f"
    path.write_bytes(b"content")
    stat = aged(path, monkeypatch)
    stamps = DigestCache(folder)
    stamps.record("f", stat, stat, "d" * 64)
    stamps.save()
    return path


def test_a_stamp_outlives_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stamped(tmp_path, monkeypatch)
    assert DigestCache(tmp_path).digest("f", path.stat()) == "d" * 64
    assert DigestCache(tmp_path).digest("g", path.stat()) is None
    assert DigestCache(tmp_path / "other").digest("f", path.stat()) is None


def test_reading_keeps_a_stamp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"content")
    before = aged(path, monkeypatch)
    fields = list(before)
    fields[7] += 5  # the access time, as reading moves it
    nanoseconds = {name: getattr(before, name) for name in ("st_mtime_ns", "st_ctime_ns")}
    after = os.stat_result(fields, nanoseconds)
    assert after.st_atime != before.st_atime
    stamps = DigestCache(tmp_path)
    stamps.record("f", before, after, "d" * 64)
    assert stamps.digest("f", before) == "d" * 64


def test_a_write_that_restores_size_and_mtime_ends_a_stamp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stamped(tmp_path, monkeypatch)
    before = path.stat()
    path.write_bytes(b"c0ntent")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (7, before.st_mtime_ns)
    assert DigestCache(tmp_path).digest("f", path.stat()) is None


def test_a_replaced_file_ends_a_stamp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stamped(tmp_path, monkeypatch)
    (tmp_path / "new").write_bytes(b"c0ntent")
    (tmp_path / "new").replace(path)
    assert DigestCache(tmp_path).digest("f", path.stat()) is None


def test_a_file_that_changed_while_it_was_read_gets_no_stamp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"content")
    before = path.stat()
    path.write_bytes(b"longer content")
    aged(path, monkeypatch)
    stamps = DigestCache(tmp_path)
    stamps.record("f", before, path.stat(), "d" * 64)
    assert stamps.digest("f", before) is None
    assert stamps.digest("f", path.stat()) is None


def test_a_file_just_written_gets_no_stamp(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"content")
    now = path.stat().st_ctime_ns + 1_900_000_000
    monkeypatch.setattr("wanx.files.checksum.time.time_ns", lambda: now)
    stamps = DigestCache(tmp_path)
    stamps.record("f", path.stat(), path.stat(), "d" * 64)
    stamps.save()
    assert stamps.digest("f", path.stat()) is None
    assert not cache.exists()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"f": 1}', b'{"f": []}', b'{"f": [3, 1]}', b"\xff", b"[" * 9999]
)
def test_a_damaged_cache_is_an_empty_one(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    path = stamped(tmp_path, monkeypatch)
    (entry,) = cache.iterdir()
    entry.write_bytes(content)
    stamps = DigestCache(tmp_path)
    assert stamps.digest("f", path.stat()) is None
    stamps.record("f", path.stat(), path.stat(), "e" * 64)
    stamps.save()
    assert DigestCache(tmp_path).digest("f", path.stat()) == "e" * 64


def test_an_unwritable_cache_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = stamped(tmp_path, monkeypatch)
    assert DigestCache(tmp_path).digest("f", path.stat()) is None


def test_no_home_folder_means_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *_, **__: Path("~/.cache/wanx"))
    path = stamped(tmp_path, monkeypatch)
    assert DigestCache(tmp_path).digest("f", path.stat()) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f"]


def test_an_interrupted_save_keeps_the_old_stamps(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stamped(tmp_path, monkeypatch)
    stamps = DigestCache(tmp_path)
    stamps.record("f", path.stat(), path.stat(), "e" * 64)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wanx.files.checksum.os.replace", fail)
    stamps.save()
    assert DigestCache(tmp_path).digest("f", path.stat()) == "d" * 64
    assert len(list(cache.iterdir())) == 1
