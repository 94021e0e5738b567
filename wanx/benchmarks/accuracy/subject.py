"""One of the two bundles of a comparison, and the parts of a run on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wanx.bundle.reader import Bundle
from wanx.config.models import ModelConfig
from wanx.errors import WanxError
from wanx.runtime.denoise import Trajectory
from wanx.runtime.inputs.conditioning import Conditioning, condition, noise_shape
from wanx.runtime.inputs.reading import Inputs
from wanx.runtime.options import ResolvedRun
from wanx.runtime.sampling.guidance import Branch, branches
from wanx.runtime.sampling.noise import randn
from wanx.runtime.sessions import open_session
from wanx.runtime.sessions.base import Array, Session, State
from wanx.runtime.text import PromptTokenizer, encode_prompts

Float32 = NDArray[np.float32]
OnStep = Callable[[Mapping[Branch, Mapping[str, Array]], Mapping[Branch, Float32]], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One run that both bundles are put through."""

    run: ResolvedRun
    inputs: Inputs


@dataclass(frozen=True, kw_only=True, eq=False)
class Start:
    """All that a bundle's DiT needs for a run: text ``[1, text_len, text_dim]`` by branch, inputs.

    The text and the inputs are as the bundle's own encoders see them.
    """

    run: ResolvedRun
    config: ModelConfig
    contexts: Mapping[Branch, Float32]
    given: Conditioning

    def trajectory(self, *, nudged: bool = False) -> Trajectory:
        """Stand at the noise of the run; ``nudged`` moves every value of it up by one ulp."""
        latent = None
        if nudged:
            noise = randn(noise_shape(self.run, self.given, self.config), self.run.seed)
            latent = np.nextafter(noise, np.float32(np.inf))
        return Trajectory(self.run, self.contexts, self.given, self.config, latent=latent)


@dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """A bundle and how to run it."""

    role: Literal["candidate", "reference"]
    bundle: Bundle
    threads: int | None = None

    @property
    def config(self) -> ModelConfig:
        """Of the model."""
        return self.bundle.manifest.config

    def open(self, component: str) -> Session:
        """Load a component."""
        return open_session(self.bundle, component, threads=self.threads)

    def prepare(self, cases: Sequence[Case], on_prompt: Callable[[], None]) -> list[Start]:
        """Encode the prompts, images and videos of every run.

        Args:
            cases: the runs.
            on_prompt: called when the prompts of a run are done.
        """
        tokenizer = PromptTokenizer(self.bundle.tokenizer_path)
        contexts = []
        with self.open("text_encoder") as session:
            for run in (case.run for case in cases):
                texts: dict[Branch, str] = {
                    "conditional": run.prompt,
                    "unconditional": run.negative_prompt,
                }
                prompts = {branch: texts[branch] for branch in branches(run.guide_scale)}
                contexts.append(
                    encode_prompts(session, tokenizer, prompts, self.config.dit.text_len)
                )
                on_prompt()
        return [
            Start(
                run=case.run,
                config=self.config,
                contexts=context,
                given=condition(case.run, case.inputs, self.config, self.open),
            )
            for case, context in zip(cases, contexts, strict=True)
        ]

    def decode(self, latent: Float32) -> Iterator[Float32]:
        """Decode a latent ``[C, T, h, w]`` to frames ``[3, n, H, W]``, chunk by chunk."""
        state: State = {}
        for name, chunks in (("first", range(1)), ("rest", range(1, latent.shape[1]))):
            if not chunks:
                continue
            with self.open(f"vae_decoder_{name}") as session:
                for index in chunks:
                    part = np.ascontiguousarray(latent[None, :, index : index + 1])
                    yield session.run({"latent": part}, state)["video"][0]


def denoise(session: Session, video: Trajectory, on_step: OnStep) -> Float32 | None:
    """Take a trajectory to its end on the network's own velocities.

    Args:
        session: a DiT.
        video: at its noise.
        on_step: shown what each branch was fed and answered.

    Returns:
        The clean latent ``[C, T, h, w]``; None where it stopped being finite, after the step that
        ``video.step`` tells.
    """
    session.bind(video.constants)
    while not video.done:
        feeds = video.feeds()
        made = session.run_each(list(feeds.values()))
        velocities = {b: out["velocity"] for b, out in zip(feeds, made, strict=True)}
        on_step(feeds, velocities)
        try:
            video.advance(velocities)
        except WanxError:
            return None
    return video.result
