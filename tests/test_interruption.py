"""Ctrl-C where C or C++ calls Python, which swallows or dies of what Python raises."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from wanx.interruption import INTERRUPTED, cleanup_on_sigint, exit_on_sigint

# The C library calls back into Python, which is interrupted there.
PROGRAM = """
import ctypes, os, signal, sys
from contextlib import ExitStack
from pathlib import Path
from wanx.interruption import exit_on_sigint, cleanup_on_sigint

@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
def compare(a, b):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        print("raised")
        raise
    return 0

def undo(name):
    with open(sys.argv[1], "a") as file:
        file.write(name)

def fails():
    undo("fails ")
    raise RuntimeError

with ExitStack() as stack:
    if sys.argv[2] == "ends":
        stack.enter_context(exit_on_sigint())
    stack.enter_context(cleanup_on_sigint(lambda: undo("first ")))
    with cleanup_on_sigint(lambda: undo("done ")):
        pass
    stack.enter_context(cleanup_on_sigint(fails))
    ctypes.CDLL(None).qsort((ctypes.c_int * 2)(1, 2), 2, ctypes.sizeof(ctypes.c_int), compare)
    print("went on")
"""


def start(tmp_path: Path, how: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "undone"), how],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def test_ends_inside_c_and_undoes_the_latest_first(tmp_path: Path) -> None:
    done = start(tmp_path, "ends")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"{INTERRUPTED}\n")
    assert (tmp_path / "undone").read_text() == "fails first "


def test_an_exception_would_not_have_ended_it(tmp_path: Path) -> None:
    done = start(tmp_path, "raises")
    assert done.stdout == "raised\nwent on\n"
    assert not (tmp_path / "undone").exists()


def test_the_handler_before_comes_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with exit_on_sigint():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before
    undone: list[str] = []
    with pytest.raises(KeyboardInterrupt), cleanup_on_sigint(lambda: undone.append("no")):
        os.kill(os.getpid(), signal.SIGINT)
    assert undone == []
