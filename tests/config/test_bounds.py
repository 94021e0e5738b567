"""Bounds of what buys resources, from Python; the command line's are in test_cli.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import wanx
from wanx.benchmarks.speed.suite import BenchOptions
from wanx.config.bounds import MAX_THREADS, require_between
from wanx.errors import UsageError
from wanx.exporter.targets.options import BuilderOptions
from wanx.runtime.sessions.registry import SessionOptions


@pytest.mark.parametrize("threads", [0, -1, MAX_THREADS + 1, 10**30, True, 2.0, "4"])
@pytest.mark.parametrize(
    "call",
    [
        lambda threads: wanx.load(threads=threads),
        lambda threads: wanx.verify("tiny", threads=threads),
        lambda threads: wanx.compare("tiny", "tiny", clips=False, threads=threads, steps=1),
        lambda threads: wanx.bench(options=BenchOptions(threads=threads)),
        lambda threads: SessionOptions(threads=threads),
    ],
    ids=["load", "verify", "compare", "bench", "session"],
)
@pytest.mark.fault("number without bounds")
def test_threads(
    call: Callable[[object], object],
    threads: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"threads is .*; choose 1 to {MAX_THREADS}"):
        call(threads)


def test_bounds_belong_to_the_range() -> None:
    for value in (None, 1, MAX_THREADS):
        require_between("threads", value, 1, MAX_THREADS)
    SessionOptions(threads=MAX_THREADS)
    require_between("threads", np.int64(2), 1, MAX_THREADS)
    BuilderOptions(workspace=1 << 40)
    for size in (0, -1, (1 << 40) + 1):
        with pytest.raises(UsageError, match="--workspace in bytes is"):
            BuilderOptions(workspace=size)
