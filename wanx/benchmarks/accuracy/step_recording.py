"""The steps of one run of a denoiser, kept on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wanx.errors import WanxError
from wanx.runtime.sampling.guidance import Branch
from wanx.runtime.sessions.base import Array

Float32 = NDArray[np.float32]
Feeds = Mapping[Branch, Mapping[str, Array]]
Velocities = Mapping[Branch, Float32]


class StepRecording:
    """Feeds and velocities of a denoiser at each step; iterating gives them back in order.

    A step of a 14B model at 720p has 60 MB, so the fifty of a run, let alone several runs, do not
    belong into the memory that the next model needs.
    """

    def __init__(self, folder: Path) -> None:
        """Make ``folder`` and start an empty recording in it."""
        folder.mkdir()
        self._folder = folder
        self._steps = 0
        self._branches: dict[int, tuple[Branch, ...]] = {}

    def append(self, feeds: Feeds, velocities: Velocities) -> None:
        """Record a step.

        Args:
            feeds: of each branch: ``tokens`` and ``timestep``, which the branches share; none where
                the network did not run.
            velocities: of each branch, ``[1, L, D]``.

        Raises:
            WanxError: the disk is full.
        """
        self._steps += 1
        if not feeds:
            return
        shared = next(iter(feeds.values()))
        try:
            with self._path(self._steps).open("wb") as file:
                for array in (shared["tokens"], shared["timestep"], *velocities.values()):
                    np.save(file, array, allow_pickle=False)
        except OSError as error:
            raise WanxError(
                f"step {self._steps} of the reference cannot be kept in {self._folder}: "
                f"{error.strerror}; set TMPDIR to a folder with more space"
            ) from None
        self._branches[self._steps] = tuple(velocities)

    def __iter__(self) -> Iterator[tuple[int, dict[str, Array], Velocities]]:
        """Yield each step of the network: its number, from 1, feeds, and velocities by branch."""
        for step, branches in self._branches.items():
            with self._path(step).open("rb") as file:
                feeds = {name: np.load(file) for name in ("tokens", "timestep")}
                yield step, feeds, {branch: np.load(file) for branch in branches}

    def _path(self, step: int) -> Path:
        return self._folder / f"{step}.npy"
