"""Times and memory of the parts of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from wanx.runtime.peak_rss import peak_bytes, reset_peak


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Time and memory of one part of a run.

    Attributes:
        name: ``text``, ``condition`` (where there are images or videos), ``denoise``, ``decode`` or
            ``write`` (where there is a file): what decoding waits for the file, which a thread
            writes.
        load_seconds: loading the component.
        seconds: running it.
        calls: seconds of each prompt, denoising step, and latent frame (or tile of one) that is
            decoded; of opening the file, of each wait for its writer, and of the last one with
            closing; none of ``condition``.
        peak_bytes: peak resident memory of the process, mapped weights included.
    """

    name: str
    load_seconds: float
    seconds: float
    calls: tuple[float, ...]
    peak_bytes: int | None


@dataclass
class StageTimer:
    """Times of a run: stages, and in each of them its loads, its calls and the writing."""

    stages: list[Stage] = field(default_factory=list)
    _loaded: float = 0.0
    _calls: list[float] = field(default_factory=list)
    _written: list[float] = field(default_factory=list)
    _mark: float = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a stage, and its writing as one of its own."""
        reset_peak()
        self._loaded, self._calls, self._written = 0.0, [], []
        start = self._mark = time.perf_counter()
        yield
        total, peak = time.perf_counter() - start, peak_bytes()
        written = sum(self._written)
        computed = total - self._loaded - written
        self.stages.append(
            Stage(
                name=name,
                load_seconds=self._loaded,
                seconds=computed,
                calls=tuple(self._calls),
                peak_bytes=peak,
            )
        )
        if self._written:
            self.stages.append(
                Stage(
                    name="write",
                    load_seconds=0.0,
                    seconds=written,
                    calls=tuple(self._written),
                    peak_bytes=peak,
                )
            )

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Count what is loaded within the stage apart."""
        start = time.perf_counter()
        yield
        self._mark = time.perf_counter()
        self._loaded += self._mark - start

    @contextmanager
    def call(self) -> Iterator[None]:
        """Measure one of the stage's calls."""
        start = time.perf_counter()
        yield
        self._calls.append(time.perf_counter() - start)

    def lap(self) -> None:
        """Measure a call that ends now; it began when the one before, or loading, ended."""
        start, self._mark = self._mark, time.perf_counter()
        self._calls.append(self._mark - start)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Measure what the stage spends on the file, apart."""
        start = time.perf_counter()
        yield
        self._written.append(time.perf_counter() - start)
