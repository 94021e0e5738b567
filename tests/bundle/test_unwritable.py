"""Bundles that cannot be written, and folders that fill up, vanish or fail meanwhile."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import wanx
from tests.bundle.test_publish import export, extend, names
from tests.support.paths import ROOT
from tests.support.users import not_root, public_folder
from wanx.builtin import builtin_bundle
from wanx.bundle.manifest import FileRecord
from wanx.bundle.publish import publish_bundle
from wanx.bundle.reader import open_bundle
from wanx.bundle.trust import mark_trusted
from wanx.errors import CorruptInputError, WanxError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def one_line(action: Callable[[], object]) -> str:
    with pytest.raises(WanxError) as caught:
        action()
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A bundle on a file system that is mounted read-only, beside folders that can be written."""
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    shutil.copytree(builtin_bundle(), tmp_path / "b")
    bind = ["mount", "--bind", str(tmp_path / "b"), str(mounted)]
    if not shutil.which("mount") or subprocess.run(bind, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    subprocess.run(["mount", "-o", "remount,bind,ro", str(mounted)], check=True)
    yield mounted
    subprocess.run(["umount", str(mounted)], check=True)


SMALL = ["--steps", "1", "--size", "32x32", "--frames", "5", "--threads", "1", "-q"]
COMMANDS: dict[str, tuple[list[str], int]] = {
    "build": (["build", "BUNDLE", "--target", "cpu"], 1),
    "export": (["export", "tiny", "-o", "BUNDLE/sub"], 1),
    "run": (["run", "BUNDLE", "a red circle", "-o", "x.mp4", *SMALL], 0),
    "inspect": (["inspect", "BUNDLE"], 0),
    "verify": (["verify", "BUNDLE"], 0),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_on_a_read_only_bundle(read_only: Path, tmp_path: Path, command: str) -> None:
    arguments, expected = COMMANDS[command]
    result = subprocess.run(
        [sys.executable, "-m", "wanx", *(a.replace("BUNDLE", str(read_only)) for a in arguments)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == expected, result.stderr
    assert "Traceback" not in result.stderr
    if expected:
        assert result.stderr.splitlines()[-1].startswith("error: cannot write ")
        assert "Read-only file system" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("closed", ["bundle", "parent"])
@pytest.mark.fault("read-only bundle")
def test_a_build_without_permission(closed: str) -> None:
    with public_folder() as root:
        target = root / "place/b"
        export(target, "one")
        folder = {"bundle": target, "parent": target.parent}[closed]
        other = {"bundle": target.parent, "parent": target}[closed]
        other.chmod(0o777)
        folder.chmod(0o555)
        before = open_bundle(target).hash
        with not_root():
            assert open_bundle(target, verify="full").hash == before
            message = one_line(lambda: extend(target, "key", "one"))
        assert message.startswith("cannot write ")
        assert "Permission denied" in message
        assert names(target.parent) == ["b"]
        assert names(target) == ["manifest.json", "tokenizer", "weights"]


CODES = [errno.EROFS, errno.EACCES, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ENOENT]


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("call", ["mkdir", "fsync", "rename", "replace"])
@pytest.mark.fault("full disk")
def test_a_build_whose_disk_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    """Each call of a build fails in turn: one line, and the bundle stays as it was."""
    target = tmp_path / "b"
    export(target, "one")
    extend(target, "old", "old")
    before = open_bundle(target, verify="full").hash
    real = getattr(os, call)
    for failing in range(1, 100):
        calls = 0

        def fail(*arguments: Any, failing: int = failing, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == failing:
                name = () if call == "fsync" else (str(arguments[0]),)
                raise OSError(code, os.strerror(code), *name)
            return real(*arguments, **options)

        written = False

        def note() -> None:
            nonlocal written
            written = True

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            try:
                extend(target, "new", "new", note)
            except WanxError as error:
                assert str(error).isprintable()  # noqa: PT017
            except OSError:
                assert not written, f"call {failing} was in a build"  # what the block did itself
        if open_bundle(target, verify="full").hash != before:
            # It did not matter, or it was the last sync of the folder, after all is done.
            assert names(target / "engines") == ["new"]
            extend(target, "old", "old")
        assert open_bundle(target).hash == before
        assert names(target / "engines") == ["old"]
        assert names(tmp_path) == ["b"]
        if calls < failing:
            break
    assert failing > 1


def test_a_bundle_that_vanishes_during_a_build(tmp_path: Path) -> None:
    target = tmp_path / "b"
    export(target, "one")
    message = one_line(
        lambda: extend(target, "key", "one", lambda: target.rename(tmp_path / "elsewhere"))
    )
    assert str(target) in message
    assert names(tmp_path) == ["elsewhere"]


def test_a_file_that_vanishes_during_the_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "b"
    export(target, "one")

    def vanish(root: Path, name: str, _: bool) -> None:
        (root / name).unlink()

    monkeypatch.setattr("wanx.bundle.integrity.regular_file_problem", vanish)
    with pytest.raises(CorruptInputError, match=r"cannot be read \(No such file"):
        open_bundle(target)


def test_a_working_folder_that_vanished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()

    def publish() -> None:
        with publish_bundle("b"):
            pass

    assert "working folder" in one_line(publish)
    assert "cannot be read" in one_line(lambda: wanx.inspect("b"))


@pytest.mark.parametrize("problem", ["file", "none"])
def test_a_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    files = {"engines/k/dit/plan.json": FileRecord(sha256="0" * 64, size=1)}
    assert mark_trusted("engines/k/dit/plan.json", files)
    if problem == "file":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    else:
        monkeypatch.setattr("wanx.bundle.trust.cache_path", lambda *_: None)
    assert not mark_trusted("engines/k/dit/plan.json", files)
