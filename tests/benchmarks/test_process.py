"""Child processes: nothing that they have started outlives them, and their ends in words."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wanx.benchmarks.process import child_session, describe_exit, last_line

# A child in a process group of its own, as compilers have them, beside one in the same group.
FAMILY = """
import pathlib, subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
children = [subprocess.Popen(sleep), subprocess.Popen(sleep, process_group=0)]
pathlib.Path(sys.argv[1]).write_text(" ".join(str(child.pid) for child in children))
time.sleep(float(sys.argv[2]))
"""


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("seconds", [0, 600])
def test_nothing_outlives_the_block(seconds: int, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with child_session([sys.executable, "-c", FAMILY, str(pids), str(seconds)]) as process:
        while not (pids.exists() and pids.read_text()):
            time.sleep(0.05)
        assert os.getsid(process.pid) == process.pid
        if seconds == 0:
            process.wait()
    children = [int(pid) for pid in pids.read_text().split()]
    assert len(children) == 2
    deadline = time.time() + 10
    while any(map(runs, children)) and time.time() < deadline:
        time.sleep(0.05)
    assert not any(map(runs, children))
    assert process.returncode == (0 if seconds == 0 else -signal.SIGKILL)


def test_an_error_ends_it_too(tmp_path: Path) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    with pytest.raises(KeyboardInterrupt), child_session(sleep, stdout=subprocess.PIPE) as process:
        raise KeyboardInterrupt
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("sys.exit(3)", "exit code 3"),
        ("os.abort()", "signal SIGABRT"),
        ("os.kill(os.getpid(), 9)", "SIGKILL, as the system does when memory runs out"),
    ],
)
def test_how_a_process_ended(code: str, words: str) -> None:
    process = subprocess.run([sys.executable, "-c", f"import os, sys; {code}"], check=False)
    assert describe_exit(process.returncode) == words


def test_the_last_line_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_line(log) is None
    log.write_bytes(b"one\ntwo \xff three\n\n")
    assert last_line(log, 5) == "two \ufffd"
