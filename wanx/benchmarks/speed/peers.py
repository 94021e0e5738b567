"""Peers of a benchmark: which there are, and how close they come."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wanx.benchmarks.peers.agreement import Float32, PeerAgreement, agreement_of_runs
from wanx.benchmarks.speed.pages.stills import read_frames
from wanx.benchmarks.speed.results import Peer, Results
from wanx.benchmarks.speed.suite import trial_name
from wanx.errors import UsageError
from wanx.runtime.sampling.noise import randn

PEERS: tuple[Peer, ...] = ("diffusers", "diffusers-compiled")


def parse_peers(names: list[str]) -> tuple[Peer, ...]:
    """The peers of these names, each once.

    Raises:
        UsageError: there is no such peer.
    """
    for name in names:
        if name not in PEERS:
            raise UsageError(f"--peer {name} is not available; choose {' or '.join(PEERS)}")
    return tuple(peer for peer in PEERS if peer in names)


def with_agreements(results: Results, folder: Path) -> Results:
    """Compare each peer's first video of each case with that of the first bundle."""
    agreements = [
        _agreement(results, folder, subject, case)
        for subject, described in enumerate(results.subjects)
        if described.peer is not None
        for case in range(len(results.cases))
        if results.of(subject, case) and results.of(0, case)
    ]
    return replace(results, agreements=tuple(agreements))


def _agreement(results: Results, folder: Path, subject: int, case: int) -> PeerAgreement:
    frames = results.cases[case].frames
    paths = [
        folder / trial_name(index, case, results.of(index, case)[0].round) for index in (0, subject)
    ]
    (ours, our_video), (theirs, their_video) = (_read_run(path, frames) for path in paths)
    return agreement_of_runs(
        randn(ours[0].shape, results.cases[case].seed), ours, theirs, (our_video, their_video),
        subject=subject, case=case,
    )  # fmt: skip


def _read_run(path: Path, frames: int) -> tuple[tuple[Float32, Float32], NDArray[np.uint8]]:
    with np.load(path.with_suffix(".npz")) as stored:
        latents = stored["first"], stored["last"]
    return latents, read_frames(path, range(frames), frames)
