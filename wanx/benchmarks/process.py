"""Child processes that measure: started in a session of their own, ended with all they started."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_KILL_SECONDS = 2.0


@contextmanager
def child_session(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Run a command while the block runs; what is left of its session at the end is killed.

    Ctrl-C reaches this process alone.

    Args:
        command: program and arguments.
        options: of :class:`subprocess.Popen`.
    """
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        yield process
    finally:
        kill_session(process)


def kill_session(process: subprocess.Popen[Any]) -> None:
    """Send SIGKILL to a session's leader and to its members in any process group, and wait."""
    for pid in [process.pid, *_members(process.pid)]:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL) if pid != process.pid else process.kill()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    # A process that hangs in a driver may not even die; nobody waits for it.
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=_KILL_SECONDS)
    if process.stdout is not None:
        process.stdout.close()


def _members(session: int) -> list[int]:
    """Processes of a session; none where the system has no /proc."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, IndexError, ValueError):
            # pid (name) state ppid pgrp session; a name may hold spaces and brackets.
            if int(stat.read_text().rpartition(")")[2].split()[3]) == session:
                members.append(int(stat.parent.name))
    return members


def describe_exit(code: int) -> str:
    """The end of a process in words, from its return code."""
    if code == -signal.SIGKILL:
        return "SIGKILL, as the system does when memory runs out"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def last_line(log: Path, width: int = 300) -> str | None:
    """The last line of a log, cut to ``width`` characters; None where there is none."""
    with suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1][:width] if lines else None
    return None
