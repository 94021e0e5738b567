"""Ctrl-C where C or C++ calls Python, which swallows or dies of what Python raises."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from wanx.interruption import (
    INTERRUPTED,
    cleanup_on_sigint,
    exit_code,
    exit_on_sigint,
    interrupt_on_signals,
    result_of,
)

# The C library calls back into Python, which is interrupted there.
PROGRAM = """
import ctypes, os, signal, sys
from contextlib import ExitStack
from pathlib import Path
from wanx.interruption import cleanup_on_sigint, exit_on_sigint, interrupt_on_signals

@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
def compare(a, b):
    try:
        os.kill(os.getpid(), getattr(signal, sys.argv[3]))
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
    stack.enter_context(interrupt_on_signals())
    if sys.argv[2] == "ends":
        stack.enter_context(exit_on_sigint())
    stack.enter_context(cleanup_on_sigint(lambda: undo("first ")))
    with cleanup_on_sigint(lambda: undo("done ")):
        pass
    stack.enter_context(cleanup_on_sigint(fails))
    ctypes.CDLL(None).qsort((ctypes.c_int * 2)(1, 2), 2, ctypes.sizeof(ctypes.c_int), compare)
    print("went on")
"""


SIGNALS = ["SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGXCPU"]


def start(tmp_path: Path, how: str, name: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "undone"), how, name],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.fault("SIGTERM, SIGHUP and the like")
def test_ends_inside_c_and_undoes_the_latest_first(tmp_path: Path, name: str) -> None:
    done = start(tmp_path, "ends", name)
    code = 128 + signal.Signals[name]
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"{INTERRUPTED}\n")
    assert (tmp_path / "undone").read_text() == "fails first "


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_exception_would_not_have_ended_it(tmp_path: Path, name: str) -> None:
    done = start(tmp_path, "raises", name)
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


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.fault("SIGTERM, SIGHUP and the like")
def test_a_signal_raises_once_and_its_handler_comes_back(name: str) -> None:
    number = signal.Signals[name]
    before = signal.getsignal(number)
    cleaned_up = []

    def work() -> None:
        try:
            os.kill(os.getpid(), number)
        finally:
            if number != signal.SIGINT:  # a second Ctrl-C is of somebody who cannot wait
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), signal.SIGTERM)
            cleaned_up.append(name)

    with pytest.raises(KeyboardInterrupt), interrupt_on_signals():
        work()
    assert cleaned_up == [name]
    assert exit_code() == 128 + number
    assert signal.getsignal(number) == before


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with interrupt_on_signals(), exit_on_sigint():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# Another thread takes the signal, so the main one goes on waiting, as after one that came just
# before the wait.
WAITING = """
import os, signal, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from wanx.interruption import exit_on_sigint, interrupt_on_signals, result_of

def work():
    time.sleep(0.5)
    signal.pthread_kill(threading.get_ident(), getattr(signal, sys.argv[2]))
    time.sleep(20)

with ThreadPoolExecutor(1) as pool, interrupt_on_signals():
    if sys.argv[1] == "ends":
        with exit_on_sigint():
            result_of(pool.submit(work))
    try:
        result_of(pool.submit(work))
    except KeyboardInterrupt:
        os._exit(3)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("how", ["ends", "raises"])
def test_a_signal_before_a_wait(how: str, name: str) -> None:
    begin = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", WAITING, how, name], timeout=60, check=False)
    assert ended.returncode == (128 + getattr(signal, name) if how == "ends" else 3)
    assert time.monotonic() - begin < 15


def test_results_and_errors_of_futures() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert result_of(pool.submit(lambda: time.sleep(0.5) or "done")) == "done"
        with pytest.raises(ZeroDivisionError):
            result_of(pool.submit(lambda: 1 / 0))
