"""What a bundle draws of the prompts that training never saw, as the detector sees it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from data import Scene, split_scenes
from detector import Sighting, detect
from numpy.typing import NDArray

from wanx.benchmarks.accuracy.clips import to_pixels
from wanx.benchmarks.accuracy.subject import Case, Side, denoise
from wanx.bundle.reader import Bundle
from wanx.runtime.inputs.reading import read_inputs
from wanx.runtime.options import RunOptions, resolve
from wanx.runtime.sessions.base import Session, State

# The default is 20; with 8 the detector sees as much, in less than half the time.
STEPS = 8
Float32 = NDArray[np.float32]
FIELDS = ("colour", "background", "direction", "shape")


@dataclass(frozen=True, kw_only=True)
class Drawings:
    """Videos of scenes, each with what was seen; None where the pixels were not finite."""

    pairs: tuple[tuple[Scene, Sighting | None], ...]

    @property
    def judgements(self) -> list[bool]:
        """Five for each video: whether its object is in every frame, and each word of the scene."""
        return [right for pair in self.pairs for right in _judged(*pair).values()]

    @property
    def faultless(self) -> int:
        """How many videos have all five right."""
        return sum(all(_judged(*pair).values()) for pair in self.pairs)

    @property
    def accuracy(self) -> float:
        """Percentage of the judgements that are right."""
        return 100 * sum(self.judgements) / len(self.judgements)

    @property
    def figures(self) -> dict[str, float]:
        """Percentage of the videos that are right, by what was judged."""
        judged = [_judged(*pair) for pair in self.pairs]
        return {
            f"{name} seen": 100 * sum(row[name] for row in judged) / len(judged)
            for name in judged[0]
        }


def draw(bundle: Bundle, *, first_seed: int, steps: int | None = STEPS) -> Drawings:
    """Draw every held-out scene once, with seeds that count up; None takes the default steps."""
    config, scenes = bundle.manifest.config, split_scenes()[1]
    side = Side(role="candidate", bundle=bundle, threads=1)
    cases = []
    for number, scene in enumerate(scenes):
        asked = RunOptions(prompt=scene.caption, seed=first_seed + number, steps=steps)
        inputs = read_inputs(asked, config.task)
        cases.append(Case(run=resolve(asked, config, inputs), inputs=inputs))
    return Drawings(pairs=tuple(zip(scenes, _sightings(side, cases), strict=True)))


def _sightings(side: Side, cases: list[Case]) -> Iterator[Sighting | None]:
    starts = side.prepare(cases, lambda: None)
    with side.open("dit") as session:
        latents = [denoise(session, start.trajectory(), lambda *_: None) for start in starts]
    # Open for all videos, because loading them takes as long as decoding one.
    with side.open("vae_decoder_first") as first, side.open("vae_decoder_rest") as rest:
        for latent in latents:
            frames = None if latent is None else to_pixels(_decode(first, rest, latent))[0]
            yield None if frames is None else detect(frames)


def _decode(first: Session, rest: Session, latent: Float32) -> Iterator[Float32]:
    """Decode a latent ``[C, T, h, w]`` to frames ``[3, n, H, W]``, chunk by chunk."""
    state: State = {}
    for index in range(latent.shape[1]):
        part = np.ascontiguousarray(latent[None, :, index : index + 1])
        yield (rest if index else first).run({"latent": part}, state)["video"][0]


def _judged(wanted: Scene, seen: Sighting | None) -> dict[str, bool]:
    if seen is None:
        return dict.fromkeys(("object", *FIELDS), False)
    words = {name: getattr(wanted, name) == getattr(seen.scene, name) for name in FIELDS}
    return {"object": seen.complete} | words
