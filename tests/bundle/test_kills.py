"""Every way to change a bundle, killed at each of its file operations in turn."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.bundle.test_publish import export, extend, names, text_of
from wanx.builtin import builtin_bundle
from wanx.bundle.manifest import MANIFEST
from wanx.bundle.publish import add_engines
from wanx.bundle.reader import open_bundle, read_bundle, verify_bundle
from wanx.errors import UsageError

# Python's audit events of everything that changes a file system, and of opening files.
CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate"}
MOST_OPERATIONS = 1000

Change = Callable[[Path], object]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def killed_before(change: Change, target: Path, number: int) -> bool:
    """Run ``change`` in a process that is killed before file operation ``number``, from 1.

    Returns False where it has fewer. Half of what ``write_bytes`` writes is one of its own.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the child lacks
        child = os.fork()
    if child == 0:
        code = 70
        try:
            die_before(number, target.parent)
            change(target)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def die_before(number: int, place: Path) -> None:
    """Have this process killed before its ``number``-th file operation below ``place``."""
    operations = 0

    def count() -> None:
        nonlocal operations
        operations += 1
        if operations == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        # A removal in an open folder names no more than the file.
        relative = event in {"os.remove", "os.rmdir"} and arguments[1] not in (-1, None)
        if event in CHANGES and (relative or str(place) in str(arguments[0])):
            count()

    def fsync(handle: int, real: Callable[[int], None] = os.fsync) -> None:
        count()
        real(handle)

    def write_bytes(path: Path, data: bytes) -> int:
        with path.open("wb", buffering=0) as file:
            file.write(data[: len(data) // 2])
            count()
            return file.write(data[len(data) // 2 :])

    os.fsync = fsync
    Path.write_bytes = write_bytes  # type: ignore[assignment, method-assign]
    sys.addaudithook(audit)


def create(target: Path) -> None:
    export(target, "two")


def replace(target: Path) -> None:
    export(target, "two", force=True)


def add_engine(target: Path) -> None:
    """As ``wanx build`` does, which builds nothing that is there."""
    if "engines/new/plan.json" not in open_bundle(target).manifest.files:
        extend(target, "new", "plan two")


def switch_target(target: Path) -> None:
    """Change nothing but the manifest, as ``wanx build --target cpu`` does."""
    with add_engines(bundle := open_bundle(target)) as (_, commit):
        commit(bundle.manifest.model_copy(update={"target": "cpu"}))


def prepare_nothing(target: Path) -> None:
    target.parent.mkdir()


def prepare_bundle(target: Path) -> None:
    export(target, "one")


def prepare_engines(target: Path) -> None:
    export(target, "one")
    extend(target, "old", "plan one")


def state(target: Path) -> object:
    """All that a bundle is, but for the time of its making; None where there is none."""
    try:
        bundle = open_bundle(target, verify="full")
    except UsageError as error:
        assert "does not exist" in str(error)  # noqa: PT017
        return None
    assert not any(check.problem for check in verify_bundle(read_bundle(target)))
    return bundle.manifest.target, bundle.manifest.files


@pytest.mark.parametrize(
    ("prepare", "change"),
    [
        (prepare_nothing, create),
        (prepare_bundle, replace),
        (prepare_bundle, add_engine),
        (prepare_engines, add_engine),
        (prepare_engines, switch_target),
    ],
)
@pytest.mark.fault("kill at every file operation")
def test_a_change_killed_at_every_file_operation(
    tmp_path: Path, prepare: Change, change: Change
) -> None:
    """Every kill leaves the old state or the new one, the next opening cleans, a rerun works."""
    first, last = tmp_path / "first/b", tmp_path / "last/b"
    prepare(first)
    shutil.copytree(first.parent, last.parent)
    before = state(first)
    change(last)
    after = state(last)
    assert before != after
    seen = []
    for number in range(1, MOST_OPERATIONS):
        target = tmp_path / f"{number}/b"
        shutil.copytree(first.parent, target.parent)
        if not killed_before(change, target, number):
            break
        again = tmp_path / f"{number}-again/b"
        shutil.copytree(target.parent, again.parent)

        seen.append(state(target))
        assert seen[-1] in (before, after), number
        assert names(target.parent) == (["b"] if target.exists() else []), number
        if target.exists():
            assert not {path.name for path in target.iterdir() if path.name.startswith(".")}
            listed = open_bundle(target).manifest.files
            on_disk = {p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()}
            assert on_disk == {*listed, MANIFEST}, number

        if change is not create or not again.exists():
            change(again)
        assert state(again) == after, number
        assert names(again.parent) == ["b"], number
        shutil.rmtree(target.parent)
        shutil.rmtree(again.parent)
    else:
        raise AssertionError("it never ended by itself")
    assert len(seen) > 20
    assert {str(before), str(after)} == {str(one) for one in seen}
    assert seen == sorted(seen, key=lambda one: one == after)  # never back again


def test_leftover_engines_of_older_versions(tmp_path: Path) -> None:
    """Before, a killed build left engines in the bundle, which then neither ran nor was built."""
    target = tmp_path / "b"
    shutil.copytree(builtin_bundle(), target)
    expected = open_bundle(target, verify="full").hash
    (target / "engines/rtx-sm89-0123456789ab/dit").mkdir(parents=True)
    (target / "engines/rtx-sm89-0123456789ab/dit/plan.json").write_text(json.dumps({}))
    assert not any(check.problem for check in verify_bundle(read_bundle(target)))
    assert open_bundle(target, verify="full").hash == expected
    assert names(target / "engines") == ["onnxruntime-cpu"]


def test_leftovers_in_a_folder_that_cannot_be_written_do_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "b"
    export(target, "one")
    (target / "engines/left").mkdir(parents=True)
    (target / "engines/left/plan.json").write_text("half")
    (tmp_path / ".b.wanx-123.partial").mkdir()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("wanx.files.file_lock.FileLock.acquire", refuse)
    assert text_of(target) == "one"
    assert names(tmp_path) == [".b.wanx-123.partial", "b"]


def test_what_a_living_process_is_writing_stays(tmp_path: Path) -> None:
    target = tmp_path / "b"
    export(target, "one")
    with add_engines(open_bundle(target)) as (folder, _):
        (target / "engines/moved").mkdir(parents=True)
        assert text_of(target) == "one"
        assert folder.is_dir()
        assert (target / "engines/moved").is_dir()
    del _  # which holds the bundle
    assert text_of(target) == "one"
    assert not (target / "engines/moved").exists()
