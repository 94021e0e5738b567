"""Comparing whole runs of wanx with those of diffusers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.support.peers import relative_error
from wanx.runtime.sampling.sampler import Sampler

Pixels = NDArray[np.uint8]


def psnr(a: Pixels, b: Pixels) -> float:
    assert a.shape == b.shape
    error = np.square(a.astype(np.float64) - b).mean()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


@contextmanager
def levels_of(scheduler: Any, sampler: Sampler) -> Iterator[None]:
    """Let a scheduler of diffusers step through the noise levels of ``sampler``."""
    original = scheduler.set_timesteps

    def set_timesteps(steps: int, device: Any = None) -> None:
        original(steps, device=device)
        scheduler.sigmas = torch.from_numpy(sampler.sigmas)
        scheduler.timesteps = torch.tensor(sampler.timesteps)

    scheduler.set_timesteps = set_timesteps
    try:
        yield
    finally:
        del scheduler.set_timesteps


def assert_moving(frames: Pixels) -> None:
    """The comparison would be worth little on a flat or still picture."""
    assert frames.std(axis=(0, 1, 2)).min() > 10
    if len(frames) > 1:
        moved = np.abs(np.diff(frames.astype(int), axis=0)).mean(axis=(1, 2, 3))
        assert moved.min() > 1


def assert_same_video(
    ours: tuple[Pixels, list[NDArray[np.float32]]], theirs: tuple[Pixels, list[torch.Tensor]]
) -> None:
    assert_moving(theirs[0])
    for our_latent, their_latent in zip(ours[1], theirs[1], strict=True):
        assert relative_error(our_latent, their_latent) <= 1e-4
    assert psnr(ours[0], theirs[0]) >= 50
