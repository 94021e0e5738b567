"""The parts of a run: encode prompts, condition, denoise, decode.

Whatever makes videos is put together from them: the pipeline, comparisons, calibration.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from wanx.bundle.reader import Bundle
from wanx.config.models import ModelConfig
from wanx.runtime.denoise import DenoisingRun
from wanx.runtime.inputs.conditioning import Conditioning, OpenSession, condition
from wanx.runtime.inputs.reading import Inputs
from wanx.runtime.options import ResolvedRun
from wanx.runtime.sampling.guidance import Branch, branches
from wanx.runtime.sessions import open_session
from wanx.runtime.sessions.base import Array, Session, State
from wanx.runtime.sessions.onnxruntime.providers import AUTO
from wanx.runtime.stages import StageTimer
from wanx.runtime.text import PromptTokenizer, clean_prompt, encode_prompt

Float32 = NDArray[np.float32]
Contexts = dict[Branch, Float32]
OnStep = Callable[[Mapping[Branch, Mapping[str, Array]], Mapping[Branch, Float32]], None]
T = TypeVar("T")

_log = logging.getLogger("wanx.runtime")
_PROMPT_OPTIONS: dict[Branch, str] = {
    "conditional": "prompt", "unconditional": "negative_prompt"
}  # fmt: skip


def _ignore(*_: Any) -> None:
    pass


def prompts_by_branch(run: ResolvedRun) -> dict[Branch, str]:
    """Prompts of the branches that the run's guidance scale needs."""
    prompts: dict[Branch, str] = {
        "conditional": run.prompt, "unconditional": run.negative_prompt
    }  # fmt: skip
    return {branch: prompts[branch] for branch in branches(run.guide_scale)}


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedRun:
    """A run as the encoders of one bundle see it: all that its DiT needs.

    Attributes:
        contexts: text features ``[1, text_len, text_dim]`` by branch.
        conditioning: the encoded images and videos.
    """

    run: ResolvedRun
    config: ModelConfig
    contexts: Mapping[Branch, Float32]
    conditioning: Conditioning

    def start(self, latent: Float32 | None = None) -> DenoisingRun:
        """Start denoising from the run's noise, or from ``latent`` ``[C, T, h, w]``."""
        return DenoisingRun(self.run, self.contexts, self.conditioning, self.config, latent=latent)


@dataclass(frozen=True, kw_only=True, eq=False)
class RunParts:
    """The parts of a run on the networks of one bundle, each loaded when its turn comes.

    Attributes:
        bundle: names the model and has the tokenizer.
        open: gives a component as a context manager, which frees it.
        timer: counts the loads, and each call of a network: a prompt, a step, a decoded chunk.
    """

    bundle: Bundle
    open: OpenSession
    timer: StageTimer = field(default_factory=StageTimer)

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        *,
        threads: int | None = None,
        vram_budget: int | None = None,
        provider: str = AUTO,
        fallback: bool = False,
    ) -> Self:
        """Take the components from a bundle; arguments as of :func:`open_session`."""
        return cls(
            bundle=bundle,
            open=partial(
                open_session,
                bundle,
                threads=threads,
                vram_budget=vram_budget,
                provider=provider,
                fallback=fallback,
            ),
        )

    @property
    def config(self) -> ModelConfig:
        """Configuration of the model."""
        return self.bundle.manifest.config

    @contextmanager
    def session(self, component: str) -> Iterator[Session]:
        """Load a component, and free it at the end."""
        with self.timer.loading():
            opened = self.open(component)
        with opened as session:
            yield session

    def encode_prompts(
        self,
        runs: Sequence[ResolvedRun],
        on_prompt: Callable[[], None] = _ignore,
        on_run: Callable[[], None] = _ignore,
        on_cut: Callable[[str, int, int], None] = _ignore,
    ) -> list[Contexts]:
        """Encode the prompts of runs, one after the other, with one text encoder.

        Args:
            runs: name the prompts, and the guidance scales that say which of them are needed.
            on_prompt: called after each prompt.
            on_run: called after each run's last prompt.
            on_cut: called for a prompt that is cut, with the name of its option, how many tokens
                are kept and how many it has.

        Returns:
            For each run the text features ``[1, text_len, text_dim]`` by branch.
        """
        encoded, text_len = [], self.config.dit.text_len
        with self.bundle.names_in_errors(), ExitStack() as stack:
            tokenizer = PromptTokenizer(self.bundle.held(self.bundle.tokenizer_path))
            session = stack.enter_context(self.session("text_encoder"))
            for run in runs:
                contexts: Contexts = {}
                for branch, prompt in prompts_by_branch(run).items():
                    with self.timer.call():
                        contexts[branch] = encode_prompt(session, tokenizer, prompt, text_len)
                    tokens = tokenizer.count(clean_prompt(prompt))
                    if tokens > text_len:
                        option = _PROMPT_OPTIONS[branch]
                        _log.warning(
                            "the %s has %d tokens, of which the first %d are used; shorten it",
                            option.replace("_", " "), tokens, text_len,
                        )  # fmt: skip
                        on_cut(option, text_len, tokens)
                    on_prompt()
                encoded.append(contexts)
                on_run()
        return encoded

    def condition(self, run: ResolvedRun, inputs: Inputs) -> Conditioning:
        """Encode the images and videos of a run."""
        return condition(run, inputs, self.config, self.session)

    def encode(
        self, runs: Sequence[tuple[ResolvedRun, Inputs]], on_run: Callable[[], None] = _ignore
    ) -> list[EncodedRun]:
        """Encode the prompts, images and videos of runs.

        Args:
            runs: each with the images and videos that it names.
            on_run: called when the prompts of a run are done.
        """
        contexts = self.encode_prompts([run for run, _ in runs], on_run=on_run)
        return [
            EncodedRun(
                run=run,
                config=self.config,
                contexts=context,
                conditioning=self.condition(run, inputs),
            )
            for (run, inputs), context in zip(runs, contexts, strict=True)
        ]

    def denoise(
        self, session: Session, denoising: DenoisingRun, on_step: OnStep = _ignore
    ) -> Float32:
        """Take a run to its end on the network's own velocities.

        Args:
            session: the ``dit``; one serves any number of runs, one after the other.
            denoising: the run, at its noise.
            on_step: called after each step with the feeds and the velocities of each branch.

        Returns:
            The clean latent ``[C, T, h, w]``.

        Raises:
            NonFiniteLatentError: a latent is not finite, after the step ``denoising.steps_done``.
        """
        session.bind(denoising.constants)
        while not denoising.done:
            with self.timer.call():
                feeds = denoising.feeds()
                outputs = session.run_each(list(feeds.values()))
                velocities: Contexts = {
                    branch: output["velocity"]
                    for branch, output in zip(feeds, outputs, strict=True)
                }
                denoising.advance(velocities)
            on_step(feeds, velocities)
        return denoising.result

    def decode(
        self,
        latent: Float32,
        convert: Callable[[Float32], T],
        on_frame: Callable[[], None] = _ignore,
    ) -> Iterator[T]:
        """Decode a latent ``[C, T, h, w]``, one of its frames at a time.

        Args:
            latent: clean.
            convert: applied to the video frames ``[3, n, H, W]`` of each latent frame.
            on_frame: called once the caller is done with those of a latent frame.

        Yields:
            The results of ``convert``.
        """
        state: State = {}
        for name, indices in (("first", range(1)), ("rest", range(1, latent.shape[1]))):
            if not indices:
                continue
            with self.session(f"vae_decoder_{name}") as session:
                for index in indices:
                    with self.timer.call():
                        frame = np.ascontiguousarray(latent[None, :, index : index + 1])
                        frames = convert(session.run({"latent": frame}, state)["video"][0])
                    yield frames
                    on_frame()
