"""The parts of a run: encode prompts, condition, denoise, decode.

Whatever makes videos is put together from them: the pipeline, comparisons, calibration.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from wanx.bundle.reader import Bundle
from wanx.config.models import ModelConfig
from wanx.runtime.denoise import DenoisingRun
from wanx.runtime.inputs.conditioning import Conditioning, condition
from wanx.runtime.inputs.reading import Inputs
from wanx.runtime.memory.vae_plan import plan_vae
from wanx.runtime.options import ResolvedRun
from wanx.runtime.sampling.cache.base import StepCache
from wanx.runtime.sampling.guidance import Branch
from wanx.runtime.sessions import open_session
from wanx.runtime.sessions.base import Array, OpenSession, Session
from wanx.runtime.sessions.onnxruntime.providers import AUTO
from wanx.runtime.sessions.registry import effective_provider
from wanx.runtime.sizes import latent_shape
from wanx.runtime.stages import StageTimer
from wanx.runtime.step_cache import CachePlan
from wanx.runtime.text import PromptTokenizer, clean_prompt, encode_prompt
from wanx.runtime.vae.decode import Convert, decode
from wanx.runtime.vae.encode import Clip, encode
from wanx.runtime.vae.memory import VaePlan

Float32 = NDArray[np.float32]
Contexts = dict[Branch, Float32]
OnStep = Callable[[Mapping[Branch, Mapping[str, Array]], Mapping[Branch, Float32]], None]

_log = logging.getLogger("wanx.runtime")
_PROMPT_OPTIONS: dict[Branch, str] = {
    "conditional": "prompt", "unconditional": "negative_prompt"
}  # fmt: skip


def _ignore(*_: Any) -> None:
    pass


def prompts_by_branch(run: ResolvedRun) -> dict[Branch, str]:
    """Prompts of the branches that the run's guidance needs."""
    prompts: dict[Branch, str] = {
        "conditional": run.prompt, "unconditional": run.negative_prompt
    }  # fmt: skip
    return {branch: prompts[branch] for branch in run.guidance.branches}


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedRun:
    """A run as the encoders of one bundle see it: all that its DiT needs.

    Attributes:
        contexts: text features ``[1, text_len, text_dim]`` by branch.
        conditioning: the encoded images and videos.
        cache: plan of the step cache.
    """

    run: ResolvedRun
    config: ModelConfig
    contexts: Mapping[Branch, Float32]
    conditioning: Conditioning
    cache: CachePlan | None = None

    def start(
        self, latent: Float32 | None = None, *, cache: StepCache | None = None
    ) -> DenoisingRun:
        """Start denoising from the run's noise, or from ``latent`` ``[C, T, h, w]``.

        Args:
            latent: to start from.
            cache: instead of the run's own.
        """
        if cache is None and self.cache is not None:
            cache = self.cache.start()
        return DenoisingRun(
            self.run, self.contexts, self.conditioning, self.config, latent=latent, cache=cache
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class RunParts:
    """The parts of a run on the networks of one bundle, each loaded when its turn comes.

    Attributes:
        bundle: names the model and has the tokenizer.
        open: gives a component as a context manager, which frees it; keywords are those of
            :func:`open_session`.
        timer: counts the loads, and each call of a network: a prompt, a step, a decoded chunk.
        memory: most bytes that the process may take of the host; None is what is free.
        vram_budget: likewise of the GPU.
        provider: of ONNX Runtime that will run, for plans of memory.
        tile_area: most latent places of a tile of the VAE, instead of what ``memory`` allows.
    """

    bundle: Bundle
    open: OpenSession
    timer: StageTimer = field(default_factory=StageTimer)
    memory: int | None = None
    vram_budget: int | None = None
    provider: str = AUTO
    tile_area: int | None = None

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        *,
        threads: int | None = None,
        vram_budget: int | None = None,
        memory: int | None = None,
        provider: str = AUTO,
        fallback: bool = False,
    ) -> Self:
        """Take the components from a bundle; arguments as of :func:`open_session`."""
        return cls(
            bundle=bundle,
            memory=memory,
            vram_budget=vram_budget,
            provider=effective_provider(provider, fallback=fallback),
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
    def session(self, component: str, **options: Any) -> Iterator[Session]:
        """Load a component, and free it at the end; options as of :func:`open_session`."""
        with self.timer.loading():
            opened = self.open(component, **options)
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
        _, *size = latent_shape(run.width, run.height, run.frames, self.config.vae)
        return condition(
            run, inputs, self.config, self.session, lambda clips: self.encode_clips(clips, size)
        )

    def encode_clips(self, clips: Sequence[tuple[Clip, int]], size: Sequence[int]) -> list[Float32]:
        """Encode clips; see :func:`wanx.runtime.vae.encode.encode`.

        Args:
            clips: each with its number of frames.
            size: of the longest's latent: frames, rows and columns.
        """
        beside = sum(frames > 1 for _, frames in clips)
        plan = self.vae_plan("vae_encoder_down", size, max(beside, 1))
        return encode(clips, plan.tiling, self.config.vae, self._vae_session(plan), plan.fits)

    def vae_plan(self, part: str, size: Sequence[int], clips: int = 1) -> VaePlan:
        """Plan of a part of the VAE for latents of a size: frames, rows and columns.

        It is the plan for the memory that there is now; see
        :func:`wanx.runtime.memory.plan.plan_memory` for what does not fit.

        Args:
            part: that can be cut into tiles.
            size: of a latent.
            clips: that are encoded beside each other.
        """
        return plan_vae(
            self.bundle.manifest, part, size, clips=clips, tile_area=self.tile_area,
            memory=self.memory, vram_budget=self.vram_budget, provider=self.provider,
        )  # fmt: skip

    def _vae_session(self, plan: VaePlan) -> OpenSession:
        """Open sessions as a plan has them."""
        options: dict[str, Any] = {} if plan.arena else {"arena": False}
        if plan.leaves_preferred:
            options["provider"] = plan.provider
        return partial(self.session, **options)

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
                outputs = session.run_each(list(feeds.values())) if feeds else []
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
        convert: Convert,
        on_call: Callable[[], None] = _ignore,
        plan: VaePlan | None = None,
    ) -> Iterator[NDArray[Any]]:
        """Decode a latent ``[C, T, h, w]``; see :func:`wanx.runtime.vae.decode.decode`.

        Args:
            latent: clean.
            convert: applied to the frames of a tile.
            on_call: called once the caller is done with what a call gave.
            plan: of :meth:`vae_plan`, which makes one where it is left out.
        """
        plan = plan or self.vae_plan("vae_decoder_up", latent.shape[1:])
        return decode(
            latent, plan.tiling, self.config.vae, self._vae_session(plan), convert,
            self.timer.call, on_call, plan.fits,
        )  # fmt: skip
