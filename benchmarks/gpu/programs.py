"""Compiles what is measured, in processes of their own, all at once, before anything is timed.

    python -m benchmarks.gpu.programs 14B fp8 FOLDER

compiles one transformer. Compiling takes minutes on one core and seconds of the GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.context import BenchContext, no_metrics
from benchmarks.gpu.report import Measurement, ReportItem, Times
from benchmarks.gpu.sizes import MODELS, PRECISIONS

TINY = "tiny-aoti"
LONGEST = 240.0  # seconds
RESERVE = 60.0  # seconds before the end, from which on nothing is waited for
_THREADS = "4"  # of each process, as several compile at once


@dataclass(frozen=True, kw_only=True)
class Job:
    """Something to compile.

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
    """How to compile a program, or the built-in model."""
    if name == TINY:
        export = ("-m", "wanx", "export", "tiny", "--target", "aoti", "-o", str(folder / TINY))
        return Job(name=name, command=(sys.executable, *export), strict=False)
    model, _, precision = name.partition("-")
    arguments = (model, precision, str(folder / name))
    return Job(name=name, command=(sys.executable, "-m", __name__, *arguments))


def compile_error(folder: Path) -> str:
    """Why there is no ``folder`` of something compiled."""
    note = folder.with_name(f"{folder.name}.error")
    return note.read_text(encoding="utf-8") if note.exists() else "it was not asked for"


def programs(
    bench: BenchContext, jobs: Sequence[Job], meanwhile: Callable[[], object] = lambda: None
) -> Iterator[ReportItem]:
    """Run all jobs at once, and ``meanwhile`` in this process.

    Of what fails or takes too long, ``NAME.error`` in the folder says why.
    """
    if not jobs:
        return
    limit = min(LONGEST, bench.left() - RESERVE)
    with ThreadPoolExecutor(len(jobs)) as threads:
        started = {threads.submit(_compile, job, bench.folder, limit): job.name for job in jobs}
        if error := bench.first_run("meanwhile", meanwhile, no_metrics).error:
            yield Measurement(operation="compile", implementation="torch.compile", error=error)
        for done in as_completed(started):
            seconds, error = done.result()
            times = Times(seconds=(seconds,)) if error is None else None
            yield Measurement(
                operation="compile", implementation=started[done], times=times, error=error
            )


def _compile(job: Job, folder: Path, limit: float) -> tuple[float, str | None]:
    """Run a job; return its seconds, and why it failed."""
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": _THREADS}
    if not job.strict:
        environment.pop("WANX_STRICT", None)
    start = time.time()
    error = None
    with (folder / f"{job.name}.log").open("w+", encoding="utf-8", errors="replace") as log:
        try:
            done = subprocess.run(
                job.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                timeout=limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            error = f"it was not done within {limit:.0f} s"
        else:
            if done.returncode:
                log.seek(0)
                last = (log.read().strip().splitlines() or ["it said nothing"])[-1]
                error = f"exit code {done.returncode}: {last:.300}"
    if error is not None:
        (folder / f"{job.name}.error").write_text(error, encoding="utf-8")
    return time.time() - start, error


def main() -> None:
    """Compile one transformer for the GPU of this machine."""
    from benchmarks.gpu.random_dit import recipe_of, with_blocks
    from wanx.exporter.components import dit_spec
    from wanx.exporter.quantization.quantized_spec import quantized_spec
    from wanx.exporter.targets import aoti

    name, precision, folder = sys.argv[1:]
    (config,) = (model.config for model in MODELS if model.name == name)
    # Blocks are alike, so that one program serves any number of them.
    config = with_blocks(config, 1)
    spec = dit_spec(config)
    if precision != "bf16":
        spec = quantized_spec(spec, recipe_of(config, precision == "fp8-attention"))
    # Whole or not at all: who looks for the plan must not find half of it.
    building = Path(f"{folder}.building")
    aoti.build(spec, torch.bfloat16, building)
    building.rename(folder)


if __name__ == "__main__":
    main()
