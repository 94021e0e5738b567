"""Growth of a denoising step with the number of tokens, and predictions from it.

Linears, norms and everything else that sees tokens one by one take time in proportion to L, and
attention to L squared, so a step of L tokens takes ``a·L + b·L²`` seconds. Both factors are fitted
to measured steps by least squares of the relative errors, neither below zero.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from wanx.benchmarks.speed.feeds import dit_feeds
from wanx.bundle.reader import Bundle
from wanx.errors import UsageError
from wanx.progress import Progress, no_progress
from wanx.runtime.sessions import open_session
from wanx.runtime.sessions.onnxruntime.providers import AUTO
from wanx.runtime.sizes import latent_shape
from wanx.runtime.tokens import token_grid

LEAST_POINTS = 3
Grid = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """``seconds = linear · L + quadratic · L²``."""

    linear: float
    quadratic: float

    def seconds(self, tokens: int) -> float:
        """The predicted time of a step."""
        return self.linear * tokens + self.quadratic * tokens**2

    @property
    def crossover(self) -> float:
        """The number of tokens at which both terms are equal; infinite without a quadratic one."""
        return self.linear / self.quadratic if self.quadratic > 0 else float("inf")


@dataclass(frozen=True, kw_only=True)
class Point:
    """The steps that were measured at one number of tokens.

    Attributes:
        label: of the size.
        tokens: of the transformer.
        seconds: of each step after the warm-up.
        unseen: the time that a fit to all other points predicts, seconds; None for fewer than
            three others.
    """

    label: str
    tokens: int
    seconds: tuple[float, ...]
    unseen: float | None = None


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A size that was not measured."""

    label: str
    tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Growth of a subject's steps.

    Attributes:
        subject: index of the subject.
        branches: forwards of a step.
        points: what was measured, by tokens.
        fit: to all of them.
        predictions: of sizes that were not measured.
    """

    subject: int
    branches: int
    points: tuple[Point, ...]
    fit: Fit
    predictions: tuple[Prediction, ...]


def fit(tokens: Sequence[int], seconds: Sequence[float]) -> Fit:
    """Fit the two factors.

    Raises:
        UsageError: there are fewer than two numbers of tokens.
    """
    if len(set(tokens)) < 2:
        raise UsageError(f"{len(set(tokens))} number of tokens cannot be fitted; sweep 2 or more")
    length, target = np.asarray(tokens, float), np.asarray(seconds, float)
    terms = np.stack([length, length**2], axis=1) / target[:, None]
    factors, *_ = np.linalg.lstsq(terms, np.ones(len(target)), rcond=None)
    if factors.min() < 0:
        # The best fit with one of them at zero is that of the other alone.
        alone = terms.sum(axis=0) / (terms**2).sum(axis=0)
        errors = ((terms * alone - 1) ** 2).sum(axis=0)
        best = int(np.argmin(errors))
        factors = np.where(np.arange(2) == best, alone, 0.0)
    return Fit(linear=float(factors[0]), quadratic=float(factors[1]))


def leave_one_out(points: Sequence[Point]) -> tuple[Point, ...]:
    """The points, each with the time that a fit to the others predicts."""
    predicted_points = []
    for index, point in enumerate(points):
        others = [p for i, p in enumerate(points) if i != index]
        unseen = None
        if len(others) >= LEAST_POINTS - 1 and len({p.tokens for p in others}) >= 2:
            model = fit([p.tokens for p in others], [median(p.seconds) for p in others])
            unseen = model.seconds(point.tokens)
        predicted_points.append(
            Point(label=point.label, tokens=point.tokens, seconds=point.seconds, unseen=unseen)
        )
    return tuple(predicted_points)


def sweep(
    bundle: Bundle,
    sizes: Sequence[tuple[int, int, int]],
    *,
    subject: int = 0,
    branches: int = 2,
    steps: int = 3,
    warm_up: int = 1,
    threads: int | None = None,
    provider: str = AUTO,
    predict: Sequence[tuple[int, int, int]] = (),
    progress: Progress = no_progress,
) -> Sweep:
    """Measure steps of several sizes, in turn so that drift hits all alike, and fit them.

    Args:
        bundle: whose transformer it is.
        sizes: width, height and frames of the videos.
        subject: index that the result bears.
        branches: forwards of a step: 2 with guidance.
        steps: measured at each size.
        warm_up: steps before them at each size.
        threads: of the processor; None takes all cores.
        provider: of ONNX Runtime; ``auto`` takes the target's own.
        predict: sizes to predict.
        progress: told how many steps are done.

    Raises:
        UsageError: there are fewer than three numbers of tokens.
        WanxError: the network cannot be run.
    """
    config = bundle.manifest.config
    grids = {grid_of(bundle, *size): label(*size) for size in sizes}
    by_length = {int(np.prod(grid)): grid for grid in grids}
    if len(by_length) < LEAST_POINTS:
        raise UsageError(
            f"a sweep needs {LEAST_POINTS} numbers of tokens or more, these sizes have "
            f"{len(by_length)}; give --sizes that differ"
        )
    taken: dict[int, list[float]] = {length: [] for length in sorted(by_length)}
    total, done = len(taken) * (warm_up + steps), 0
    with open_session(bundle, "dit", threads=threads, provider=provider) as session:
        for number in range(steps):
            for length in taken:
                feeds = dit_feeds(config, by_length[length], branches)
                session.bind(feeds.constants)
                for _ in range(warm_up if number == 0 else 0):
                    session.run_each(feeds.branches)
                    done += 1
                start = time.perf_counter()
                session.run_each(feeds.branches)
                taken[length].append(time.perf_counter() - start)
                done += 1
                progress("sweep", done, total, "steps")
    points = [
        Point(label=grids[by_length[length]], tokens=length, seconds=tuple(seconds))
        for length, seconds in taken.items()
    ]
    model = fit(list(taken), [median(seconds) for seconds in taken.values()])
    labels = {int(np.prod(grid_of(bundle, *size))): label(*size) for size in predict}
    return Sweep(
        subject=subject,
        branches=branches,
        points=leave_one_out(points),
        fit=model,
        predictions=tuple(
            Prediction(label=name, tokens=length, seconds=model.seconds(length))
            for length, name in sorted(labels.items())
            if length not in taken
        ),
    )


def grid_of(bundle: Bundle, width: int, height: int, frames: int) -> Grid:
    """Tokens along time, height and width."""
    config = bundle.manifest.config
    return token_grid(latent_shape(width, height, frames, config.vae), config.dit.patch_size)


def label(width: int, height: int, frames: int) -> str:
    """A size in words."""
    return f"{width}x{height}, {frames} frames"


def default_sizes(bundle: Bundle, width: int, height: int, frames: int) -> list[Grid]:
    """Four lengths of a video, from about a quarter of its frames to all of them."""
    stride = bundle.manifest.config.vae.temporal_stride
    most = (frames - 1) // stride
    counts = sorted({round(most * part) for part in (0.25, 0.5, 0.75, 1)} | {0})[-4:]
    return [(width, height, count * stride + 1) for count in counts]
