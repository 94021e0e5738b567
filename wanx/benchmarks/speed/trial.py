"""One trial: a process of its own, watched from outside."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from wanx.benchmarks.speed.results import Memory, Peer
from wanx.benchmarks.speed.telemetry import MemoryWatch
from wanx.errors import WanxError
from wanx.progress import Progress, no_progress
from wanx.runtime.stages import Stage


class Outcome(TypedDict):
    """What a trial took; see :class:`wanx.benchmarks.speed.results.Trial`."""

    cold_start_seconds: float
    end_to_end_seconds: float
    stages: tuple[Stage, ...]
    memory: Memory


def run_trial(
    bundle: Path,
    options: Mapping[str, Any],
    folder: Path,
    *,
    name: str,
    peer: Peer | None = None,
    threads: int | None = None,
    progress: Progress = no_progress,
) -> Outcome:
    """Make one video in a new process.

    Args:
        bundle: its folder.
        options: of :class:`wanx.runtime.options.RunOptions`, as JSON has them.
        folder: gets ``<name>.mp4`` and ``<name>.npz``, the latents after the first and last step.
        name: of the trial's files.
        peer: who makes the video with the bundle's weights, instead of wanx.
        threads: of the processor; None takes all cores.
        progress: told what the process is doing.

    Raises:
        WanxError: what the process raised, or how it ended.
    """
    spec = {
        "bundle": str(bundle),
        "peer": peer,
        "options": dict(options),
        "threads": threads,
        "output": str(folder / f"{name}{'.png' if options['frames'] == 1 else '.mp4'}"),
        "latents": str(folder / f"{name}.npz"),
        "started": 0.0,
    }
    spec_path, result_path = folder / f"{name}.spec.json", folder / f"{name}.result.json"
    log_path = folder / f"{name}.log"
    watch = MemoryWatch()
    with log_path.open("wb") as log:
        spec["started"] = time.monotonic()
        spec_path.write_text(json.dumps(spec), encoding="utf-8")
        module = "wanx.benchmarks.speed.worker"
        command = [sys.executable, "-m", module, str(spec_path), str(result_path)]
        # A session of its own: Ctrl-C is for this process, which then ends that one.
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True,
            start_new_session=True,
        ) as process:  # fmt: skip
            try:
                with watch.watching(process.pid):
                    assert process.stdout is not None
                    for line in process.stdout:
                        _pass_on(line, progress)
                    process.wait()
            except BaseException:
                process.kill()
                raise
    if process.returncode != 0 or not result_path.exists():
        raise WanxError(f"it ended with {_end(process.returncode)}{_last_line(log_path)}")
    result = json.loads(result_path.read_text(encoding="utf-8"))
    if "error" in result:
        error = WanxError(result["error"])
        error.exit_code = result["exit_code"]
        raise error
    return Outcome(
        cold_start_seconds=result["cold_start_seconds"],
        end_to_end_seconds=result["end_to_end_seconds"],
        stages=tuple(Stage(**s | {"calls": tuple(s["calls"])}) for s in result["stages"]),
        memory=watch.memory(),
    )


def _pass_on(line: str, progress: Progress) -> None:
    try:
        stage, done, total, unit = json.loads(line)
    except ValueError:
        return  # a library that prints to stdout
    progress(stage, done, total, unit)


def _end(code: int) -> str:
    if code == -signal.SIGKILL:
        return "SIGKILL, as the system does when memory runs out"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return f" ({lines[-1]:.200})" if lines else ""
