"""Compilation of the measured programs, in processes of their own beside the worker.

    python -m benchmarks.gpu.programs 14B fp8 FOLDER

compiles one transformer. Compiling takes minutes on one core and seconds of the GPU, so the
supervisor starts all jobs at once at the beginning, and they survive a crash of the worker. Nothing
is timed before they are done or killed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from benchmarks.gpu.context import BenchContext, no_metrics
from benchmarks.gpu.report import Measurement, ReportItem, Times
from benchmarks.gpu.sizes import MODELS, PRECISIONS
from wanx.benchmarks.process import child_session, describe_exit, kill_session, last_line

TINY = "tiny-aoti"
MAX_SECONDS = 240.0
MAX_SHARE = 0.4  # of the minutes, after which jobs are killed
_THREADS = "4"  # of each process, as several compile at once
_POLL = 0.2


@dataclass(frozen=True, kw_only=True)
class Job:
    """Compilation of one program.

    Attributes:
        name: of its folder.
        command: that makes the folder.
        strict: whether a kernel that cannot run is an error.
    """

    name: str
    command: tuple[str, ...]
    strict: bool = True


def names(models: Sequence[str]) -> list[str]:
    """The programs of some models."""
    return [f"{model}-{precision}" for model in models for precision in PRECISIONS]


def job(name: str, folder: Path) -> Job:
    """The job for a program, or for the built-in model."""
    if name == TINY:
        export = ("-m", "wanx", "export", "tiny", "--target", "aoti", "-o", str(folder / TINY))
        return Job(name=name, command=(sys.executable, *export), strict=False)
    model, _, precision = name.partition("-")
    arguments = (model, precision, str(folder / name))
    return Job(name=name, command=(sys.executable, "-m", __name__, *arguments))


def compile_error(folder: Path) -> str:
    """The reason why there is no ``folder`` of something compiled."""
    note = folder.with_name(f"{folder.name}.error")
    return note.read_text(encoding="utf-8") if note.exists() else "it was not asked for"


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[Any]
    started: float = field(default_factory=time.time)


class Compilation:
    """Jobs that run while its block runs.

    Of each job ``NAME.seconds`` or ``NAME.error`` in the folder tells the end.
    """

    def __init__(self, jobs: Sequence[Job], folder: Path, deadline: float) -> None:
        """Take jobs to start; what is not done by ``deadline`` (:func:`time.time`) is killed."""
        self._jobs, self._folder, self._deadline = jobs, folder, deadline
        self._stack, self._running = ExitStack(), list[_Running]()

    def __enter__(self) -> Compilation:
        """Start all jobs."""
        for each in self._jobs:
            environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": _THREADS}
            if each.strict:
                environment["WANX_STRICT"] = "1"
            else:
                environment.pop("WANX_STRICT", None)
            log = self._stack.enter_context(
                _log(self._folder, each.name).open("w", encoding="utf-8")
            )
            process = self._stack.enter_context(
                child_session(
                    each.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
                )
            )
            self._running.append(_Running(each, process))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Kill what still runs."""
        self._stack.close()

    def poll(self) -> None:
        """Note which jobs have ended, and kill those that take too long."""
        for each in list(self._running):
            code = each.process.poll()
            seconds = time.time() - each.started
            if code is None and time.time() <= self._deadline:
                continue
            self._running.remove(each)
            kill_session(each.process)
            name = each.job.name
            if code == 0:
                (self._folder / f"{name}.seconds").write_text(f"{seconds:.3f}", encoding="utf-8")
                continue
            error = f"it was not done within {seconds:.0f} s"
            if code is not None:
                said = last_line(_log(self._folder, name)) or "it said nothing"
                error = f"{describe_exit(code)}: {said}"
            (self._folder / f"{name}.error").write_text(error, encoding="utf-8")


def _log(folder: Path, name: str) -> Path:
    return folder / f"{name}.log"


def programs(
    bench: BenchContext, needed: Sequence[str], meanwhile: Callable[[], object] = lambda: None
) -> Iterator[ReportItem]:
    """Run ``meanwhile`` in this process, and wait until all programs are compiled or given up."""
    if error := bench.first_run("meanwhile", meanwhile, no_metrics).error:
        yield Measurement(operation="compile", implementation="torch.compile", error=error)
    waiting = [name for name in needed if _log(bench.folder, name).exists()]  # was started
    for name in needed:
        if name not in waiting:
            error = compile_error(bench.folder / name)
            yield Measurement(operation="compile", implementation=name, error=error)
    while waiting and bench.left() > 0:
        for name in list(waiting):
            done = bench.folder / f"{name}.seconds"
            failed = bench.folder / f"{name}.error"
            if failed.exists():
                error = compile_error(bench.folder / name)
                yield Measurement(operation="compile", implementation=name, error=error)
            elif done.exists():
                times = Times(seconds=(float(done.read_text(encoding="utf-8")),))
                yield Measurement(operation="compile", implementation=name, times=times)
            else:
                continue
            waiting.remove(name)
        if waiting:
            time.sleep(_POLL)
    for name in waiting:
        error = "the time was over before it was compiled"
        yield Measurement(operation="compile", implementation=name, error=error)


def main() -> None:
    """Compile one transformer for the GPU of this machine."""
    from benchmarks.gpu.random_dit import recipe_of, with_blocks
    from wanx.exporter.components import dit_spec
    from wanx.exporter.partition.partition import partition
    from wanx.exporter.quantization.quantized_spec import quantized_spec
    from wanx.exporter.targets.aoti import AotiBuilder

    name, precision, folder = sys.argv[1:]
    (config,) = (model.config for model in MODELS if model.name == name)
    # Blocks are alike, so that one program serves any number of them.
    config = with_blocks(config, 1)
    spec = dit_spec(config)
    if precision != "bf16":
        spec = quantized_spec(spec, recipe_of(config, precision == "fp8-attention"))
    # Whole or not at all: whoever looks for the schedule must not find half of it.
    building = Path(f"{folder}.building")
    AotiBuilder().build(spec.name, partition(spec, torch.bfloat16), building)
    building.rename(folder)


if __name__ == "__main__":
    main()
