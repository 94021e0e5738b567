"""Directories that are read while other processes replace and delete them."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import signal
from pathlib import Path

import pytest

from tests.support.processes import running
from tests.support.users import not_root, public_folder
from wanx.files import held_directory
from wanx.files.held_directory import HeldDirectory, delete_unless_held, is_held

HOLD = """
import sys, time
from pathlib import Path
from wanx.files.held_directory import HeldDirectory
held = HeldDirectory(Path(sys.argv[1]))
print((held.path / "file").read_text(), flush=True)
time.sleep(600)
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "file").write_text("one")
    return folder


def replace(directory: Path) -> Path:
    """Put another directory in its place; return where it is now."""
    aside = directory.with_name("aside")
    directory.rename(aside)
    directory.mkdir()
    (directory / "file").write_text("two")
    return aside


def test_it_stays_the_same_whatever_takes_its_name(directory: Path) -> None:
    held = HeldDirectory(directory)
    aside = replace(directory)
    assert (held.path / "file").read_text() == "one"
    delete_unless_held(aside)
    assert (held.path / "file").read_text() == "one"
    assert (HeldDirectory(directory).path / "file").read_text() == "two"
    del held
    gc.collect()
    delete_unless_held(aside)
    assert not aside.exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_is_held_as_long_as_its_process_lives(directory: Path, number: int) -> None:
    assert not is_held(directory)
    with running(HOLD, directory, says="one") as process, running(HOLD, directory, says="one"):
        process.send_signal(number)
        process.wait()
        assert is_held(directory)
        delete_unless_held(directory)
        assert (directory / "file").exists()
    assert not is_held(directory)
    delete_unless_held(directory)
    assert not directory.exists()


def test_alone_or_not(directory: Path) -> None:
    held = HeldDirectory(directory)
    with held.alone() as alone:
        assert alone
        assert is_held(directory)
    other = HeldDirectory(directory)
    with held.alone() as alone:
        assert not alone
    delete_unless_held(directory)
    del other
    gc.collect()
    delete_unless_held(directory)  # still held by the first, alone or not
    assert (directory / "file").exists()
    with held.alone() as alone:
        assert alone


def test_what_is_being_deleted_is_waited_for(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened just before its deletion, it is opened anew: here another one has its name."""
    deleter = os.open(directory, os.O_RDONLY)
    assert held_directory._lock_alone(deleter)
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            replace(directory)

    monkeypatch.setattr("time.sleep", sleep)
    held = HeldDirectory(directory)
    os.close(deleter)
    assert len(waits) == 3
    assert (held.path / "file").read_text() == "two"


def test_nobody_waits_for_ever(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_directory, "_PATIENCE", 0.1)
    deleter = os.open(directory, os.O_RDONLY)
    assert held_directory._lock_alone(deleter)
    assert (HeldDirectory(directory).path / "file").read_text() == "one"
    os.close(deleter)


def test_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        HeldDirectory(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        HeldDirectory(tmp_path / "file")
    delete_unless_held(tmp_path / "missing")
    assert not is_held(tmp_path / "missing")


def test_where_files_have_no_locks(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(held_directory.fcntl, "flock", refuse)
    held = HeldDirectory(directory)
    aside = replace(directory)
    assert (held.path / "file").read_text() == "one"
    with held.alone() as alone:
        assert alone
    delete_unless_held(aside)
    assert not aside.exists()


def test_where_there_are_neither_locks_nor_descriptors(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_directory, "_DESCRIPTORS", Path("/nowhere"))
    assert HeldDirectory(directory).path == directory
    monkeypatch.setattr(held_directory, "fcntl", None)
    held = HeldDirectory(directory)
    assert held.path == directory
    with held.alone() as alone:
        assert alone
    assert not is_held(directory)
    delete_unless_held(directory)
    assert not directory.exists()


def test_a_copy_holds_for_itself(directory: Path) -> None:
    held = HeldDirectory(directory)
    for other in (copy.deepcopy(held), pickle.loads(pickle.dumps(held))):
        assert other.path != held.path
        assert (other.path / "file").read_text() == "one"
    aside = replace(directory)
    other = copy.copy(held)
    assert (other.path / "file").read_text() == "two"
    del held
    gc.collect()
    delete_unless_held(aside)
    assert not aside.exists()


def test_a_folder_that_may_be_entered_but_not_listed() -> None:
    with public_folder() as parent:
        folder = parent / "d"
        folder.mkdir()
        (folder / "file").write_text("one")
        folder.chmod(0o711)
        with not_root():
            held = HeldDirectory(folder)
            assert (held.path / "file").read_text() == "one"
            with held.alone() as alone:
                assert alone


def test_no_descriptor_is_left(directory: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        HeldDirectory(directory)
        is_held(directory)
        delete_unless_held(directory.with_name("missing"))
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
