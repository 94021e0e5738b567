"""Batches of runs of one bundle: several seeds of one prompt, or a file with a line for each."""

from __future__ import annotations

import os
import secrets
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from wanx.errors import CancelledError, UsageError, WanxError
from wanx.runtime.options import FILE_OPTIONS, RunOptions
from wanx.runtime.output.checks import MAX_NAME_BYTES
from wanx.runtime.output.claims import claimed, claimed_name
from wanx.runtime.pipeline import Generation, Pipeline
from wanx.runtime.prompt_lines import read_prompt_lines
from wanx.runtime.sizes import parse_size

# Categories of characters that change what a terminal shows, end a line or cannot be encoded:
# controls, surrogates, separators of lines and paragraphs.
_UNPRINTABLE = frozenset({"Cc", "Cs", "Zl", "Zp"})


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a batch.

    Attributes:
        name: for reports: ``line 3``, or ``2 of 4``.
        output: file to write.
        options: of the run, or the error in them.
    """

    name: str
    output: Path
    options: RunOptions | WanxError


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Outcome of a job.

    Attributes:
        job: which.
        result: the video; None where it failed, or was not made.
        error: why it failed.
        claimed: whether another process is making it; otherwise a job without result and error has
            its output already.
    """

    job: Job
    result: Generation | None = None
    error: WanxError | None = None
    claimed: bool = False


def seeds(options: RunOptions, outputs: Sequence[Path]) -> list[Job]:
    """Make a job for each output, with successive seeds."""
    seed = secrets.randbelow(2**32) if options.seed == -1 else options.seed
    return [
        Job(
            name=f"{i + 1} of {len(outputs)}",
            output=output,
            options=replace(options, seed=seed + i),
        )
        for i, output in enumerate(outputs)
    ]


def read_jobs(path: Path, folder: Path, defaults: RunOptions, suffix: str) -> list[Job]:
    """Read a file of JSON Lines: an object a line, whose keys are fields of :class:`RunOptions`.

    Besides those, ``size`` is width and height as in ``832x480``, and ``output`` the name of the
    file in ``folder``, otherwise ``00001.mp4`` by the number of the line. Files are relative to the
    folder of ``path``. A line that cannot be understood becomes a job that fails. A ``.txt`` may
    have prompts for lines instead.

    Args:
        path: the file.
        folder: where outputs go.
        defaults: for what a line leaves out.
        suffix: of outputs that a line does not name.

    Raises:
        UsageError: the file as a whole is refused; see :func:`read_prompt_lines`.
    """
    jobs: list[Job] = []
    taken: dict[Path, str] = {}
    for number, values in read_prompt_lines(path):
        name, output = f"line {number}", folder / f"{number:05d}{suffix}"
        options: RunOptions | WanxError
        try:
            if isinstance(values, WanxError):
                raise values
            output = folder / _output(values.pop("output", output.name))
            if output in taken:
                raise UsageError(f"output {output.name} is already that of {taken[output]}")
            options = _options(values, defaults, path.parent)
        except WanxError as error:
            options = error
        taken[output] = name
        jobs.append(Job(name=name, output=output, options=options))
    return jobs


def run_jobs(
    pipeline: Pipeline,
    jobs: Sequence[Job],
    on_start: Callable[[int, Job], None],
    *,
    resume: bool,
    names: Iterator[Path] | None = None,
    **runtime: Any,
) -> Iterator[Outcome]:
    """Run jobs one after the other; one that fails does not stop the others.

    Args:
        pipeline: runs them.
        jobs: from :func:`seeds` or :func:`read_jobs`.
        resume: leave an output that exists as it is (outputs appear whole or not at all, so it is
            finished), and one that another process is making, which is looked at again at the end.
        names: endless candidates for the outputs, of which each job takes the next that is free
            when it begins; None leaves the jobs their own.
        on_start: called with the number, from 0, of each job that is about to run.
        runtime: keywords of :meth:`Pipeline.run`.

    Raises:
        CancelledError: ``cancelled`` said so; the jobs that are left do not run.
    """
    if not resume:
        for number, job in enumerate(jobs):
            with nullcontext(job.output) if names is None else claimed_name(names) as output:
                on_start(number, job)
                yield _run_job(pipeline, replace(job, output=output), runtime)
        return
    waiting: list[tuple[int, Job]] = []
    for last_time, numbered in ((False, enumerate(jobs)), (True, waiting)):
        for number, job in numbered:
            with claimed(job.output) as ours:
                if os.path.isfile(job.output):  # unlike Path.is_file, False for any bad name
                    yield Outcome(job=job)
                elif ours:
                    on_start(number, job)
                    yield _run_job(pipeline, job, runtime)
                elif last_time:
                    yield Outcome(job=job, claimed=True)
                else:
                    waiting.append((number, job))


def _run_job(pipeline: Pipeline, job: Job, runtime: dict[str, Any]) -> Outcome:
    try:
        if isinstance(job.options, WanxError):
            raise job.options
        return Outcome(job=job, result=pipeline.run(job.options, output=job.output, **runtime))
    except CancelledError:
        raise
    except WanxError as error:
        return Outcome(job=job, error=error)
    except Exception as error:  # a fault of ours in one video must not cost the others
        reason = " ".join(str(error).split())
        fault = WanxError(f"unexpected {type(error).__name__}: {reason}; please report it")
        fault.__cause__ = error
        return Outcome(job=job, error=fault)


def _output(name: object) -> str:
    """Check the name of a line's output, which is printed and joined to a folder."""
    if not isinstance(name, str) or not name or Path(name).name != name or name.startswith("."):
        raise UsageError(f"output is {name!r:.80}; give the name of a file, without folders")
    if any(unicodedata.category(character) in _UNPRINTABLE for character in name):
        raise UsageError(f"output is {name!a:.80}; give a name of printable characters")
    if len(os.fsencode(name)) > MAX_NAME_BYTES:
        raise UsageError(
            f"output is {name[:40]!r}…, {len(os.fsencode(name))} bytes long; give a name of at "
            f"most {MAX_NAME_BYTES} bytes"
        )
    return name


def _options(values: dict[str, Any], defaults: RunOptions, folder: Path) -> RunOptions:
    values = {name: value for name, value in values.items() if value is not None}
    if "size" in values:
        width, height = parse_size(str(values.pop("size")))
        values |= {"width": width, "height": height}
    known = {option.name for option in fields(RunOptions)}
    for name in values:
        if name not in known:
            choices = ", ".join(["output", "size", *sorted(known)])
            raise UsageError(f"{name!r:.80} is not an option; choose from {choices}")
    options = replace(defaults, **values)
    paths: dict[str, Any] = {
        name: _in_folder(values[name], folder) for name in FILE_OPTIONS & values.keys()
    }
    return replace(options, **paths)


def _in_folder(name: str | list[str], folder: Path) -> Path | list[Path]:
    return folder / name if isinstance(name, str) else [folder / item for item in name]
