"""Publishing, with real processes that are killed; this file is also the script they run."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.support.paths import ROOT
from wanx.bundle.manifest import Manifest, Provenance
from wanx.bundle.publish import add_engines, publish_bundle, record_files, write_manifest
from wanx.bundle.reader import open_bundle, read_bundle
from wanx.config.models import PRESETS
from wanx.errors import UsageError, WanxError
from wanx.files import file_lock
from wanx.files.checksum import sha256_file
from wanx.files.disk import preflight_space


def fill(folder: Path, text: str) -> None:
    """Write a bundle whose tokenizer file holds ``text``."""
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/tokenizer.json").write_text(text)
    (folder / "weights").mkdir()
    for part in range(3):
        (folder / f"weights/{part}.safetensors").write_bytes(bytes(1000))
    write_manifest(
        folder,
        Manifest(
            wanx_version="0.1.0",
            config=PRESETS["tiny"],
            precision="fp32",
            target="cpu",
            components={},
            provenance=Provenance(
                source="tests", source_layout="wanx", source_sha256="0" * 64, tools={},
                created=datetime.now(UTC),
            ),
            files=record_files(folder),
        ),
    )  # fmt: skip


def export(
    target: Path | str, text: str, then: Callable[[Path], object] = lambda _: None, **options: Any
) -> None:
    """Publish a bundle that holds ``text``; ``then`` happens when all is written."""
    with publish_bundle(target, **options) as folder:
        fill(folder, text)
        then(folder)


def fail_with(error: BaseException) -> Callable[[Path], NoReturn]:
    def fail(_: Path) -> NoReturn:
        raise error

    return fail


def text_of(target: Path) -> str:
    return open_bundle(target, verify="full").tokenizer_path.read_text()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def test_publishes_a_whole_bundle_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "new" / "parents" / "b"
    with publish_bundle(target) as folder:
        assert folder.parent == target.parent
        assert folder.name.startswith(".b.wanx-")
        assert names(folder) == []
        fill(folder, "one")
        assert not target.exists()
    assert names(target.parent) == ["b"]
    assert text_of(target) == "one"


def test_a_relative_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    export(Path("b"), "one")
    assert names(tmp_path) == ["b"]


@pytest.mark.fault("target that exists")
def test_an_existing_bundle_is_kept_without_force_and_replaced_with_it(tmp_path: Path) -> None:
    export(tmp_path / "b", "one")
    with pytest.raises(UsageError, match=r"b exists: .* replace it with --force"):
        export(tmp_path / "b", "two")
    assert text_of(tmp_path / "b") == "one"
    with publish_bundle(tmp_path / "b", force=True) as folder:
        fill(folder, "two")
        assert text_of(tmp_path / "b") == "one"
    assert text_of(tmp_path / "b") == "two"
    assert names(tmp_path) == ["b"]


def test_a_damaged_bundle_can_be_replaced(tmp_path: Path) -> None:
    export(tmp_path / "b", "one")
    (tmp_path / "b/tokenizer/tokenizer.json").unlink()
    export(tmp_path / "b", "two", force=True)
    assert text_of(tmp_path / "b") == "two"


def test_an_empty_folder_is_replaced_with_force_only(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    with pytest.raises(UsageError, match="exists"):
        export(tmp_path / "b", "one")
    export(tmp_path / "b", "one", force=True)
    assert text_of(tmp_path / "b") == "one"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("content", ["thesis.tex", "manifest.json", ".hidden"])
def test_a_folder_that_is_not_ours_is_never_touched(
    tmp_path: Path, content: str, force: bool
) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / content).write_text('{"name": "a browser extension"}')
    with pytest.raises(UsageError, match="is not a wanx bundle"):
        export(tmp_path / "b", "one", force=force)
    assert names(tmp_path) == ["b"]
    assert names(tmp_path / "b") == [content]


@pytest.mark.parametrize("force", [False, True])
def test_files_links_and_impossible_targets_are_refused(tmp_path: Path, force: bool) -> None:
    (tmp_path / "file").write_text("mine")
    export(tmp_path / "real", "one")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("nowhere")
    before = names(tmp_path)
    for target, found in {
        tmp_path / "file": "is a file",
        tmp_path / "link": "is a link: .* real",
        tmp_path / "dangling": "is a link: .* nowhere",
        "/": "cannot be a bundle",
        "/proc": "is a mount point",
        f"{tmp_path}/a\0b": "is not a possible path",
    }.items():
        with pytest.raises(UsageError, match=found):
            export(target, "two", force=force)  # type: ignore[arg-type]
    assert names(tmp_path) == before
    assert text_of(tmp_path / "real") == "one"


@pytest.mark.parametrize("target", ["file/b", "x" * 250])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, target: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WanxError, match=r"cannot write .*: choose another place"):
        export(tmp_path / target, "one")
    assert names(tmp_path) == ["file"]


def test_a_target_that_appears_during_the_export_is_kept(tmp_path: Path) -> None:

    def write_thesis(_: Path) -> None:
        (tmp_path / "b").mkdir()
        (tmp_path / "b/thesis.tex").write_text("mine")

    with pytest.raises(UsageError, match="is not a wanx bundle"):
        export(tmp_path / "b", "one", write_thesis, force=True)
    assert names(tmp_path) == ["b"]
    assert names(tmp_path / "b") == ["thesis.tex"]


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), SystemExit(1)])
@pytest.mark.parametrize("before", [None, "one"])
def test_a_failed_export_leaves_nothing(
    tmp_path: Path, error: BaseException, before: str | None
) -> None:
    if before:
        export(tmp_path / "b", before)
    with pytest.raises(type(error)):
        export(tmp_path / "b", "two", fail_with(error), force=True)
    assert names(tmp_path) == (["b"] if before else [])
    if before:
        assert text_of(tmp_path / "b") == before


def test_errors_about_other_files_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="checkpoint"), publish_bundle(tmp_path / "b"):
        (tmp_path / "checkpoint").read_bytes()


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_a_failed_rename_gives_the_old_bundle_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int, error: BaseException
) -> None:
    export(tmp_path / "b", "one")
    rename, calls = os.rename, 0

    def fail(source: Path, destination: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            if isinstance(error, OSError):
                raise OSError(error.errno, error.strerror, str(source))
            raise error
        rename(source, destination)

    monkeypatch.setattr("wanx.bundle.publish.os.rename", fail)
    expected = WanxError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        export(tmp_path / "b", "two", force=True)
    assert text_of(tmp_path / "b") == "one"
    assert names(tmp_path) == ["b"]


@pytest.mark.fault("power loss")
def test_every_file_and_folder_is_synced_before_it_becomes_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, int]] = []
    fsync, rename = os.fsync, os.rename

    def spy_fsync(handle: int) -> None:
        events.append(("fsync", os.fstat(handle).st_ino))
        fsync(handle)

    def spy_rename(source: Path, destination: Path) -> None:
        events.append(("rename", os.stat(source).st_ino))
        rename(source, destination)

    monkeypatch.setattr("wanx.bundle.publish.os.fsync", spy_fsync)
    monkeypatch.setattr("wanx.bundle.publish.os.rename", spy_rename)
    export(tmp_path / "b", "one")
    target = tmp_path / "b"
    renamed = events.index(("rename", target.stat().st_ino))
    synced = {inode for event, inode in events[:renamed] if event == "fsync"}
    assert synced >= {path.stat().st_ino for path in [target, *target.rglob("*")]}
    assert ("fsync", tmp_path.stat().st_ino) in events[renamed:]


def pause(stage: str) -> NoReturn:
    print(stage, flush=True)
    time.sleep(60)
    raise SystemExit(9)


def pause_at(function: Callable[..., Any], call: int, *, after: bool) -> Callable[..., Any]:
    """``function`` that stops before or after its ``call``-th call for the parent to kill it."""
    calls = 0

    def paused(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            pause(f"before {function.__name__} {call}")
        result = function(*arguments, **options)
        if calls == call and after:
            pause(f"after {function.__name__} {call}")
        return result

    return paused


def child(target: Path, stage: str) -> None:
    """Replace ``target`` and stop at ``stage``."""
    function, _, call = stage.rpartition(" ")
    if function == "write" and call == "0":
        with publish_bundle(target, force=True) as folder:
            (folder / "weights").mkdir()
            (folder / "weights/0.safetensors").write_bytes(bytes(1000))
            pause(stage)
    if function:
        when, name = function.split()
        module = shutil if name == "rmtree" else os
        setattr(module, name, pause_at(getattr(module, name), int(call), after=when == "after"))
    export(target, "two", force=True)


STAGES = {
    "write 0": "one",
    "before fsync 1": "one",  # of the manifest
    "before fsync 4": "one",  # of the tree
    "before rename 1": "one",
    "after rename 1": "one",  # the old bundle is aside, the new one is not in place
    "before rename 2": "one",
    "after rename 2": "two",
    "before rename 3": "two",
    "after rename 3": "two",
    "before rmtree 1": "two",
    "after unlink 2": "two",  # the old bundle is half deleted
}


@pytest.fixture
def start() -> Iterator[Callable[[Path, str], subprocess.Popen[str]]]:
    """Starts a process that exports to a target and waits until it is at a stage."""
    started: list[subprocess.Popen[str]] = []

    def run(target: Path, stage: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, __file__, str(target), stage],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        started.append(process)
        assert process.stdout
        assert process.stdout.readline() == f"{stage}\n"
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


Start = Callable[[Path, str], "subprocess.Popen[str]"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.fault("kill at any moment")
def test_killed_while_replacing(tmp_path: Path, start: Start, stage: str) -> None:
    place, again = tmp_path / "place", tmp_path / "again"
    export(place / "b", "one")
    process = start(place / "b", stage)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert [name for name in names(place) if not name.startswith(".")] in ([], ["b"])
    shutil.copytree(place, again)

    assert text_of(place / "b") == STAGES[stage]  # a run, straight after the crash
    export(place / "b", "three", force=True)
    assert text_of(place / "b") == "three"
    assert names(place) == ["b"]

    with pytest.raises(UsageError, match="exists"):  # an export, straight after the crash
        export(again / "b", "three")
    assert text_of(again / "b") == STAGES[stage]
    export(again / "b", "three", force=True)
    assert text_of(again / "b") == "three"
    assert names(again) == ["b"]


@pytest.mark.parametrize(
    "stage", ["write 0", "before fsync 1", "before fsync 4", "before rename 1"]
)
@pytest.mark.fault("kill at any moment")
def test_killed_while_creating(tmp_path: Path, start: Start, stage: str) -> None:
    target = tmp_path / "b"
    process = start(target, stage)
    process.kill()
    process.wait()
    assert not target.exists()
    with pytest.raises(UsageError, match="does not exist"):
        open_bundle(target)
    export(target, "three")
    assert text_of(target) == "three"
    assert names(tmp_path) == ["b"]


@pytest.mark.fault("Ctrl-C")
def test_interrupted_from_the_keyboard(tmp_path: Path, start: Start) -> None:
    export(tmp_path / "b", "one")
    process = start(tmp_path / "b", "write 0")
    process.send_signal(signal.SIGINT)
    assert process.wait() == -signal.SIGINT
    assert names(tmp_path) == ["b"]
    assert text_of(tmp_path / "b") == "one"


@pytest.mark.fault("two exporters")
def test_a_second_exporter_is_refused_and_told_who(tmp_path: Path, start: Start) -> None:
    process = start(tmp_path / "b", "write 0")
    for _ in range(2):
        with pytest.raises(UsageError) as caught:
            export(tmp_path / "b", "two", force=True)
        assert f"another export is writing {tmp_path / 'b'} (pid {process.pid})" in str(
            caught.value
        )
    assert f".b.wanx-{process.pid}.partial" in names(tmp_path)
    export(tmp_path / "c", "another target is free")
    process.kill()
    process.wait()
    export(tmp_path / "b", "two")
    assert names(tmp_path) == ["b", "c"]


def test_opening_waits_for_a_replacement_in_progress(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(tmp_path / "b", "one")
    process = start(tmp_path / "b", "after rename 1")
    killer = threading.Timer(0.5, process.kill)
    acquire = file_lock.FileLock.acquire

    def wait(lock: Any, *arguments: Any, **options: Any) -> Any:
        killer.start()
        return acquire(lock, *arguments, **options)

    monkeypatch.setattr(file_lock.FileLock, "acquire", wait)
    assert text_of(tmp_path / "b") == "one"
    killer.join()
    assert process.wait() == -signal.SIGKILL


def test_opening_survives_a_replacement_half_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(tmp_path / "b", "one")

    def replace_first(path: Path, on_bytes: Callable[[int], None] | None) -> str:
        monkeypatch.setattr("wanx.bundle.integrity.sha256_file", sha256_file)
        export(tmp_path / "b", "two", force=True)
        return sha256_file(path, on_bytes)

    monkeypatch.setattr("wanx.bundle.integrity.sha256_file", replace_first)
    assert text_of(tmp_path / "b") == "two"


def test_many_exporters_at_once_publish_one_whole_bundle(tmp_path: Path) -> None:
    outcomes: list[str] = []
    refusals: list[str] = []
    barrier = threading.Barrier(8)

    def race(number: int) -> None:
        barrier.wait()
        try:
            export(tmp_path / "b", f"export {number}")
            outcomes.append(f"export {number}")
        except UsageError as error:
            refusals.append(str(error))

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [text_of(tmp_path / "b")]
    assert len(refusals) == 7
    assert all("another export" in refusal or "exists" in refusal for refusal in refusals)
    assert names(tmp_path) == ["b"]


def test_a_set_aside_bundle_is_not_restored_over_another(tmp_path: Path) -> None:
    export(tmp_path / "b", "one")
    (tmp_path / "b").rename(tmp_path / ".b.wanx-old")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match="not a wanx bundle"):
        export(tmp_path / "b", "two", force=True)
    assert names(tmp_path) == [".b.wanx-old", "b"]
    assert text_of(tmp_path / ".b.wanx-old") == "one"


@pytest.mark.fault("full disk")
def test_preflight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 10**9
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    preflight_space(tmp_path / "deep" / "b", free // 2)
    with pytest.raises(WanxError, match=r"b needs .* MB, its disk has .* MB free: free some space"):
        preflight_space(tmp_path / "deep" / "b", free * 2)
    with pytest.raises(WanxError, match="MB free"):
        export(tmp_path / "deep" / "b", "one", needed_bytes=free * 2)
    assert names(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.fault("full disk")
def test_a_full_disk_while_writing(tmp_path: Path, code: int, wrapped: bool) -> None:
    export(tmp_path / "b", "one")
    error: Exception = OSError(code, os.strerror(code))
    if wrapped:
        error, error.__cause__ = RuntimeError("the serialiser failed"), error
    with pytest.raises(WanxError, match=r"the disk is full: .*/b needs more") as caught:
        export(tmp_path / "b", "two", fail_with(error), force=True)
    assert caught.value.exit_code == 1
    assert text_of(tmp_path / "b") == "one"
    assert names(tmp_path) == ["b"]


@pytest.mark.parametrize("call", ["mkdir", "fsync", "rename", "replace"])
@pytest.mark.fault("full disk")
def test_a_full_disk_in_our_own_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"os.{call}", full)
    with pytest.raises(WanxError, match="the disk is full"):
        export(tmp_path / "deep" / "b", "one")
    monkeypatch.undo()
    assert not (tmp_path / "deep/b").exists()
    export(tmp_path / "deep" / "b", "two")
    assert names(tmp_path / "deep") == ["b"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.fault("full disk")
def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    target = small_disk / "b"
    export(target, "one")

    def write_much(folder: Path) -> None:
        (folder / "big").write_bytes(bytes(3_000_000))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wanx.bundle.publish.preflight_space", lambda *_: None)
        with pytest.raises(WanxError, match=r"the disk is full: .* needs 3\.0 MB, (1\.0|0\.9)"):
            export(target, "two", write_much, force=True, needed_bytes=3_000_000)
    assert text_of(target) == "one"
    assert names(small_disk) == ["b"]
    with pytest.raises(WanxError, match=r"needs 3\.0 MB, its disk has"):
        export(target, "two", force=True, needed_bytes=3_000_000)


def extend(target: Path, key: str, text: str, then: Callable[[], object] = lambda: None) -> None:
    """Add one engine file, and leave out the engines that were there."""
    bundle = open_bundle(target)
    with add_engines(bundle) as (folder, commit):
        (folder / f"engines/{key}").mkdir(parents=True)
        (folder / f"engines/{key}/plan.json").write_text(text)
        then()
        before = bundle.manifest
        kept = {n: r for n, r in before.files.items() if not n.startswith("engines/")}
        files = kept | record_files(folder)
        commit(before.model_copy(update={"files": files, "target": "aoti"}))


def test_engines_are_added_and_replaced(tmp_path: Path) -> None:
    target = tmp_path / "b"
    export(target, "one")
    for key in ("first", "second", "first"):
        extend(target, key, f"plan of {key}")
        assert open_bundle(target, verify="full").manifest.target == "aoti"
        assert [p.name for p in (target / "engines").iterdir()] == [key]
        assert (target / "engines" / key / "plan.json").read_text() == f"plan of {key}"
    assert names(tmp_path) == ["b"]


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_a_failed_build_changes_nothing(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "b"
    export(target, "one")
    extend(target, "key", "one")
    before = open_bundle(target).hash
    with pytest.raises(type(error)):
        extend(target, "other", "two", lambda: raise_(error))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wanx.bundle.publish.write_manifest", lambda *_: raise_(error))
        with pytest.raises(type(error)):
            extend(target, "other", "two")
    assert open_bundle(target, verify="full").hash == before
    assert names(tmp_path) == ["b"]


def raise_(error: BaseException) -> NoReturn:
    raise error


def test_a_build_after_one_that_was_killed(tmp_path: Path) -> None:
    """Between moving the engines and listing them, they are no part of the bundle."""
    target = tmp_path / "b"
    export(target, "one")
    (target / "engines/key").mkdir(parents=True)
    (target / "engines/key/plan.json").write_text("half")
    bundle = read_bundle(target)
    with add_engines(bundle) as (folder, commit):
        (folder / "engines/key").mkdir(parents=True)
        (folder / "engines/key/plan.json").write_text("whole")
        before = bundle.manifest
        commit(before.model_copy(update={"files": before.files | record_files(folder)}))
    assert open_bundle(target, verify="full").manifest.files.keys() >= {"engines/key/plan.json"}


def test_building_while_exporting_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "b"
    export(target, "one")
    with (
        add_engines(read_bundle(target)),
        pytest.raises(UsageError, match="another export is writing"),
    ):
        export(target, "two", force=True)


def test_record_files(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/b.safetensors").write_bytes(b"b")
    (tmp_path / "weights/a.safetensors").write_bytes(b"abc")
    (tmp_path / "manifest.json").write_text("{}")
    hashed: list[int] = []
    known = {"weights/b.safetensors": "b" * 64}
    records = record_files(tmp_path, known=known, on_bytes=hashed.append)
    assert list(records) == ["weights/a.safetensors", "weights/b.safetensors"]
    assert records["weights/a.safetensors"].sha256 == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, "abc"
    )
    assert records["weights/b.safetensors"].sha256 == "b" * 64
    assert records["weights/b.safetensors"].size == 1
    assert sum(hashed) == 3


if __name__ == "__main__":
    child(Path(sys.argv[1]), sys.argv[2])
