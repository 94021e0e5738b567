"""Progress without a terminal."""

import threading
import time

import pytest

from wanx.commands.display.generation import progress_bars
from wanx.commands.display.lines import progress_lines


def test_a_stage_is_one_line_however_often_it_reports(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bars(quiet=False) as progress:
        for done in range(1001):
            progress("weights", done, 1000, "bytes")
        progress("a\nb", 0, 1, "steps")
    captured = capsys.readouterr()
    assert captured.err == "weights: 0 B of 1 kB\na\N{REPLACEMENT CHARACTER}b: 0 of 1\n"
    assert captured.out == ""


def test_a_stage_that_begins_again_is_another_line(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_lines(0.05) as progress:
        for _ in range(2):
            progress("denoise", 0, 3, "steps")
            progress("denoise", 3, 3, "steps")
        time.sleep(0.3)
        progress("denoise", 0, 5, "steps")
        progress("denoise", 1, 5, "steps")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["denoise: 0 of 3", "denoise: 0 of 3", "denoise: 0 of 5"]


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bars(quiet=True) as progress:
        progress("weights", 0, 1000, "bytes")
    assert capsys.readouterr() == ("", "")


def test_how_far_it_is_comes_while_a_step_takes_long(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_lines(0.05) as progress:
        progress("failed", 1, 4, "steps")
        progress("ended", 0, 4, "steps")
        progress("ended", 4, 4, "steps")
        progress("denoise", 1, 4, "steps")
        time.sleep(1)  # a step
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == ["failed: 1 of 4", "ended: 0 of 4", "denoise: 1 of 4"]
    repeated = lines[3:]
    assert sum(line.startswith("denoise: 1 of 4, 0.") for line in repeated) >= 3
    assert all(line.endswith(" s left") for line in repeated)
    assert sum(line.startswith("failed:") for line in repeated) <= 1
    assert not any(line.startswith("ended:") for line in repeated)
    assert all(thread.name != "progress" for thread in threading.enumerate())
