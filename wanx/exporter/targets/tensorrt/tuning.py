"""How hard TensorRT tries when it builds, and what it remembers from one build to the next."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from wanx.errors import UsageError, WanxError
from wanx.memory_size import parse_memory

_LEVELS = range(6)


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Options of the builder; None leaves what TensorRT does by itself.

    Attributes:
        workspace: most bytes that a kernel may work in.
        opt_level: 0 to 5; higher levels try more kernels and take longer.

    Raises:
        UsageError: one of them is out of range.
    """

    workspace: int | None = None
    opt_level: int | None = None

    def __post_init__(self) -> None:
        if self.workspace is not None and self.workspace < 1:
            raise UsageError(f"--workspace: {self.workspace} is not a size; give bytes, at least 1")
        if self.opt_level is not None and self.opt_level not in _LEVELS:
            raise UsageError(
                f"--opt-level {self.opt_level} is not a level; choose 0 to {_LEVELS[-1]}"
            )

    def __str__(self) -> str:
        """What tells builds apart; empty where nothing was asked for."""
        words = [f"workspace {self.workspace}"] if self.workspace is not None else []
        return " ".join(words + ([f"level {self.opt_level}"] if self.opt_level is not None else []))


BY_ITSELF = Tuning()


def parse_tuning(workspace: str | None, opt_level: int | None) -> Tuning:
    """Read a size such as ``4G``, ``512M`` or ``2048`` (MiB), and a level.

    Raises:
        UsageError: one of them is out of range.
    """
    size = None
    if workspace is not None:
        size = parse_memory(workspace, default_unit="M")  # as in trtexec
        if not size:
            raise UsageError(f"--workspace {workspace} is not a size; give one such as 4G or 512M")
    return Tuning(workspace=size, opt_level=opt_level)


def apply_tuning(trt: Any, config: Any, tuning: Tuning) -> None:
    """Set a builder's configuration.

    Raises:
        WanxError: this TensorRT has no levels, and one was asked for.
    """
    if tuning.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, tuning.workspace)
    if tuning.opt_level is not None:
        if not hasattr(config, "builder_optimization_level"):
            raise WanxError("this TensorRT has no levels of optimisation; leave --opt-level out")
        config.builder_optimization_level = tuning.opt_level


class TimingCache:
    """What TensorRT measured of kernels, kept in the user's cache folder.

    Of TensorRT-RTX, which measures nothing while it builds, there is none. A file of another GPU or
    version is refused by TensorRT, one that is damaged likewise: then the cache starts empty.
    """

    def __init__(self, config: Any, name: str) -> None:
        """Give a builder's configuration what an earlier build left under ``name``."""
        self._config, self._known, self._file = config, b"", _file(name)
        self._cache = None
        if not hasattr(config, "create_timing_cache"):
            return
        if self._file is not None:
            with suppress(OSError):
                self._known = self._file.read_bytes()
        for content in dict.fromkeys((self._known, b"")):
            self._cache = config.create_timing_cache(content)
            if self._cache is not None and config.set_timing_cache(self._cache, False):
                return
        self._cache = None

    def write(self) -> None:
        """Keep what was added, whole or not at all."""
        if self._cache is None or self._file is None:
            return
        made = bytes(self._cache.serialize())
        if not made or made == self._known:
            return
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            descriptor, fresh = tempfile.mkstemp(dir=self._file.parent)
            with os.fdopen(descriptor, "wb") as file:
                file.write(made)
            os.replace(fresh, self._file)


def monitor(trt: Any, tell: Callable[[float], None]) -> Any:
    """A progress monitor that tells how much of a build is done, from 0 to 1."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Adds up nested phases: each has its share of a step of the one around it."""

        def __init__(self) -> None:
            super().__init__()
            # By name: where it begins and how long it is, of the whole; its steps, and those done.
            self.phases: dict[str, tuple[float, float, int, int]] = {}
            self.told = 0.0

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            start, length, count, done = self.phases.get(parent or "", (0.0, 1.0, 1, 0))
            share = length / count
            self.phases[name] = (start + share * min(done, count - 1), share, max(1, steps), 0)

        def step_complete(self, name: str, step: int) -> bool:
            start, length, count, _ = self.phases[name]
            done = min(count, step + 1)
            self.phases[name] = (start, length, count, done)
            whole = start + length * done / count
            if whole >= self.told + 0.01:  # phases may end early and go back
                self.told = whole
                tell(whole)
            return True

        def phase_finish(self, name: str) -> None:
            self.phases.pop(name, None)

    return Monitor()


def _file(name: str) -> Path | None:
    cache = platformdirs.user_cache_path("wanx", appauthor=False)
    if not cache.is_absolute():  # there is no home folder
        return None
    return cache / "tensorrt" / "timing" / name
