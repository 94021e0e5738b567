"""Trial of a benchmark: one video, made by a process that is watched from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from wanx.benchmarks.process import child_session, describe_exit, last_line
from wanx.benchmarks.speed.results import Memory, Peer
from wanx.benchmarks.speed.telemetry import MemoryWatch
from wanx.bundle.reader import Bundle
from wanx.errors import WanxError
from wanx.progress import Progress, no_progress
from wanx.runtime.sessions.onnxruntime.providers import AUTO
from wanx.runtime.stages import Stage


class Outcome(TypedDict):
    """Times and memory of a trial; see :class:`wanx.benchmarks.speed.results.Trial`."""

    cold_start_seconds: float
    end_to_end_seconds: float
    stages: tuple[Stage, ...]
    memory: Memory


def run_trial(
    bundle: Bundle,
    options: Mapping[str, Any],
    folder: Path,
    *,
    name: str,
    peer: Peer | None = None,
    threads: int | None = None,
    provider: str = AUTO,
    progress: Progress = no_progress,
) -> Outcome:
    """Make one video in a new process.

    Args:
        bundle: an opened bundle, which may meanwhile be replaced.
        options: of :class:`wanx.runtime.options.RunOptions`, as JSON has them.
        folder: gets ``<name>.mp4`` and ``<name>.npz``, the latents after the first and last step.
        name: of the trial's files.
        peer: who makes the video with the bundle's weights, instead of wanx.
        threads: of the processor; None takes all cores.
        provider: of ONNX Runtime; ``auto`` takes the target's own.
        progress: told what the process is doing.

    Raises:
        WanxError: what the process raised, or how it ended.
    """
    spec = {
        "bundle": os.path.realpath(bundle.held("")),
        "hash": bundle.hash,
        "peer": peer,
        "options": dict(options),
        "threads": threads,
        "provider": provider,
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
        with (
            child_session(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True
            ) as process,
            watch.watching(process.pid),
        ):
            assert process.stdout is not None
            for line in process.stdout:
                _pass_on(line, progress)
            process.wait()
    if process.returncode != 0 or not result_path.exists():
        said = last_line(log_path, 200)
        raise WanxError(
            f"it ended with {describe_exit(process.returncode)}{f' ({said})' if said else ''}"
        )
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
