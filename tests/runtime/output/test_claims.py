"""Claims of names: between processes, after a kill, and where no lock can be made."""

from __future__ import annotations

import itertools
import os
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.processes import running
from tests.support.users import not_root, public_folder
from wanx.runtime.output.claims import claimed, claimed_name
from wanx.runtime.output.temporary import find_leftovers

HOLD = """
import sys, time
from pathlib import Path
from wanx.runtime.output.claims import claimed
with claimed(Path(sys.argv[1])) as ours:
    print(ours, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("name", ["out.mp4", "猫 🐱.gif", "a" * 251 + ".mp4", "line\nend.png"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.fault("two runs with one name")
def test_a_claim_lasts_as_long_as_its_process(tmp_path: Path, name: str, number: int) -> None:
    path = tmp_path / name
    with running(HOLD, path, says="True") as process:
        with claimed(path) as ours, claimed(tmp_path / "other.mp4") as other:
            assert (ours, other) == (False, True)
        assert find_leftovers(tmp_path, remove=True) == []
        process.send_signal(number)
        process.wait()
        assert len(find_leftovers(tmp_path)) == 1
        with claimed(path) as ours:
            assert ours
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault("SIGTERM, SIGHUP and the like")
def test_what_a_killed_process_claimed_is_removed(tmp_path: Path) -> None:
    with running(HOLD, tmp_path / "a.mp4", says="True") as process:
        process.kill()
        process.wait()
    assert len(find_leftovers(tmp_path, remove=True)) == 1
    assert list(tmp_path.iterdir()) == []


def test_free_names_are_neither_there_nor_claimed(tmp_path: Path) -> None:
    candidates = [tmp_path / f"{i}.mp4" for i in range(9)]
    candidates[1].write_bytes(b"")
    candidates[4].symlink_to("nowhere")
    with running(HOLD, candidates[2], says="True"):
        with ExitStack() as stack:
            names = [stack.enter_context(claimed_name(candidates)) for _ in range(3)]
            assert [path.stem for path in names] == ["0", "3", "5"]
        with claimed_name(candidates) as again:
            assert again == candidates[0]


def test_a_name_written_before_its_claim_is_not_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder of the claim may finish between the look at the file and the claim."""
    first, second = tmp_path / "out.mp4", tmp_path / "out-1.mp4"
    looks = itertools.count()
    real = os.path.lexists

    def lexists(path: Path) -> bool:
        there = real(path)
        if next(looks) == 0:
            first.write_bytes(b"finished")
        return there

    monkeypatch.setattr(os.path, "lexists", lexists)
    with claimed_name([first, second]) as name:
        assert name == second


@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_a_folder_that_takes_no_lock_is_left_to_the_output_s_checks(mode: int) -> None:
    with public_folder() as folder:
        folder.chmod(mode)
        with not_root(), claimed(folder / "a.mp4") as ours:
            assert ours
        folder.chmod(0o755)
    with claimed(folder / "gone.mp4") as ours:
        assert ours
