"""Videos that a bundle draws of the prompts that training never saw, as the detector sees them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

import numpy as np
from data import Scene, split_scenes
from detector import Sighting, detect
from numpy.typing import NDArray

from wanx.benchmarks.accuracy.clips import to_pixels
from wanx.bundle.reader import Bundle
from wanx.runtime.denoise import NonFiniteLatentError
from wanx.runtime.inputs.reading import Inputs, read_inputs
from wanx.runtime.options import ResolvedRun, RunOptions
from wanx.runtime.resolve import resolve
from wanx.runtime.run_parts import EncodedRun, RunParts
from wanx.runtime.sessions.base import Session
from wanx.runtime.vae.decode import floats

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
    runs = []
    for number, scene in enumerate(scenes):
        options = RunOptions(prompt=scene.caption, seed=first_seed + number, steps=steps)
        inputs = read_inputs(options, config.task)
        runs.append((resolve(options, config, inputs), inputs))
    return Drawings(pairs=tuple(zip(scenes, _sightings(bundle, runs), strict=True)))


def _sightings(bundle: Bundle, runs: list[tuple[ResolvedRun, Inputs]]) -> Iterator[Sighting | None]:
    parts = RunParts.of(bundle, threads=1)
    encoded = parts.encode(runs)
    with parts.session("dit") as session:
        latents = [_denoise(parts, session, run) for run in encoded]
    # Open for all videos, because loading them takes as long as decoding one.
    names = [f"vae_decoder_{part}" for part in ("mid_first", "mid_rest", "up_first", "up_rest")]
    with ExitStack() as stack:
        opened = {name: stack.enter_context(parts.session(name)) for name in names}
        decoders = RunParts(bundle=bundle, open=lambda name, **_: nullcontext(opened[name]))
        for latent in latents:
            frames = None
            if latent is not None:
                frames, _ = to_pixels(decoders.decode(latent, floats))
            yield None if frames is None else detect(frames)


def _denoise(parts: RunParts, session: Session, run: EncodedRun) -> Float32 | None:
    """Denoise a run to its clean latent ``[C, T, h, w]``; None where one is not finite."""
    try:
        return parts.denoise(session, run.start())
    except NonFiniteLatentError:
        return None


def _judged(wanted: Scene, seen: Sighting | None) -> dict[str, bool]:
    if seen is None:
        return dict.fromkeys(("object", *FIELDS), False)
    words = {name: getattr(wanted, name) == getattr(seen.scene, name) for name in FIELDS}
    return {"object": seen.complete} | words
