"""Names and places that an output may and may not have."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.users import not_root, public_folder
from wanx.errors import UsageError, WanxError
from wanx.runtime.output.checks import check_output, resolve_output

SIZE = {"width": 832, "height": 480, "frames": 81}


@pytest.mark.parametrize(
    "name",
    [
        "concat:a.mp4", "http://example.org/a.mp4", "HTTPS://example.org/a.mp4", "pipe:1.mp4",
        "file:a.mp4", "tcp://1.2.3.4:5/a.mp4", "subfile,,start,0,end,9,,:a.mp4",
        "async:cache:a.mp4",
        "12:30.mp4", "a b:c.mp4", Path("http://example.org/a.mp4"),
    ],
)  # fmt: skip
@pytest.mark.fault("output named like an option or a URL")
def test_protocols_are_refused(name: str | Path) -> None:
    with pytest.raises(UsageError, match="looks like a URL or protocol"):
        resolve_output(name)


@pytest.mark.parametrize(
    "name", ["-y.mp4", "-.mp4", "./concat:a.mp4", "a%03d.mp4", "übung 🐱.MP4", "a.b.webm", "|x.gif"]
)
def test_strange_file_names_become_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = check_output(name, **SIZE)
    assert path == Path(os.path.realpath(tmp_path)) / name.removeprefix("./")
    assert path.is_absolute()


@pytest.mark.parametrize(
    "name", ["", "-", ".", "..", "video", "video.avi", "video.mp4.part", ".mp4", "a.mp4/", "mp4"]
)
def test_unknown_extensions_name_the_known_ones(name: str) -> None:
    with pytest.raises(UsageError, match=r"\.mp4, \.webm, \.gif, \.png"):
        resolve_output(name)


def test_nul_is_refused() -> None:
    with pytest.raises(UsageError, match="NUL"):
        resolve_output("a\0.mp4")


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the folder .*nowhere does not exist; create it"):
        check_output(tmp_path / "nowhere" / "a.mp4", **SIZE)
    assert not (tmp_path / "nowhere").exists()


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="does not exist"):
        check_output(tmp_path / "file" / "a.mp4", **SIZE)


@pytest.mark.parametrize("overwrite", [False, True])
def test_folders_and_pipes_in_the_way(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "nothing")
    for name in ("folder.mp4", "pipe.mp4", "dangling.mp4"):
        with pytest.raises(UsageError, match=f"{name} exists and is not a regular file"):
            check_output(tmp_path / name, **SIZE, overwrite=overwrite)


def test_existing_files_need_permission(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("precious")
    with pytest.raises(UsageError, match=r"a\.mp4 exists; choose another name"):
        check_output(tmp_path / "a.mp4", **SIZE)
    check_output(tmp_path / "a.mp4", **SIZE, overwrite=True)
    assert (tmp_path / "a.mp4").read_text() == "precious"


@pytest.mark.fault("output that cannot be written")
def test_read_only_folder() -> None:
    with public_folder() as folder:
        folder.chmod(0o777)
        with not_root():
            check_output(folder / "a.mp4", **SIZE)
        folder.chmod(0o555)
        message = rf"cannot write to the folder {folder}: Permission denied"
        with not_root(), pytest.raises(UsageError, match=message):
            check_output(folder / "a.mp4", **SIZE)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that takes no files")
def test_folder_that_takes_no_files() -> None:
    with pytest.raises(UsageError, match="cannot write to the folder /proc"):
        check_output("/proc/a.mp4", **SIZE)


@pytest.mark.fault("output that cannot be written")
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    for free in (0, 5_000_000):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        with pytest.raises(WanxError, match=r"MB free and .*a\.mp4 may need 17\.2 MB") as caught:
            check_output(tmp_path / "a.mp4", **SIZE)
        assert caught.value.exit_code == 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=18_000_000))
    check_output(tmp_path / "a.mp4", **SIZE)
    with pytest.raises(WanxError, match="may need"):
        check_output(tmp_path / "a.gif", **SIZE)


def test_one_image_holds_one_frame(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can hold one frame, not 5"):
        check_output(tmp_path / "a.png", width=16, height=16, frames=5)
    for suffix in (".png", ".mp4", ".webm", ".gif"):
        check_output(tmp_path / f"a{suffix}", width=16, height=16, frames=1)


def test_checking_leaves_nothing(tmp_path: Path) -> None:
    check_output(tmp_path / "a.mp4", **SIZE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "size"),
    [("a" * 252 + ".mp4", 256), ("猫" * 84 + ".mp4", 256), ("x" * 5000 + ".gif", 5004)],
)
def test_a_name_that_is_too_long(tmp_path: Path, name: str, size: int) -> None:
    with pytest.raises(OSError, match="too long"):  # what the file system itself says
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match=f"{size} bytes long; .* takes 255 at most"):
        check_output(tmp_path / name, **SIZE)


@pytest.mark.parametrize("name", ["a" * 251 + ".mp4", "猫" * 83 + "ab.mp4"])
def test_the_longest_names(tmp_path: Path, name: str) -> None:
    assert len(os.fsencode(name)) == 255
    check_output(tmp_path / name, **SIZE).touch()


def test_a_path_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(25):  # longer than a path may be, so it must be entered step by step
        os.mkdir("f" * 200)
        os.chdir("f" * 200)
    with pytest.raises(UsageError, match="bytes long with its folder"):
        check_output("a.mp4", **SIZE)


@pytest.mark.parametrize("name", ["\ud800.mp4", "folder\udfff/a.mp4", b"a.mp4", 3, None])
def test_what_no_file_is_called(name: Any) -> None:
    with pytest.raises(UsageError, match="the output"):
        check_output(name, **SIZE)
