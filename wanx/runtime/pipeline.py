"""Prompt to video: encode text and inputs, denoise the latent, decode the frames.

The components of a bundle are loaded, run and freed in turn, so that the memory of a run is that
of its largest component.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wanx.builtin.prompts import prompt_warning
from wanx.bundle.reader import Bundle
from wanx.config.bounds import MAX_THREADS, require_between
from wanx.config.presets import suggest_preset
from wanx.errors import CancelledError
from wanx.interruption import result_of
from wanx.progress import Progress, no_progress, step_counter
from wanx.runtime.denoise import DenoisingRun
from wanx.runtime.inputs.conditioning import Conditioning
from wanx.runtime.inputs.reading import read_inputs
from wanx.runtime.memory.plan import StageMemory, plan_memory
from wanx.runtime.options import ResolvedRun, RunOptions
from wanx.runtime.output.checks import check_output
from wanx.runtime.output.frame_checks import FrameCheck
from wanx.runtime.output.video import VideoWriter
from wanx.runtime.resolve import resolve
from wanx.runtime.run_parts import EncodedRun, RunParts, prompts_by_branch
from wanx.runtime.run_plan import RunPlan, plan_run
from wanx.runtime.sessions.onnxruntime.providers import AUTO
from wanx.runtime.sessions.registry import effective_provider, require_budget, require_provider
from wanx.runtime.stages import Stage, StageTimer
from wanx.runtime.step_cache import CachePlan, forward_facts, plan_cache
from wanx.runtime.vae.parts import require_parts

Float32 = NDArray[np.float32]
Pixels = NDArray[np.uint8]
_log = logging.getLogger("wanx.runtime")

OnStep = Callable[[int, int, Float32], None]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The result of a run.

    Attributes:
        options: every option that was used, the drawn seed among them.
        stages: time and memory of each part.
        path: the file, when one was asked for.
        frames: the pixels ``[F, H, W, 3]``, when no file was asked for.
        cut: of each prompt that is longer than the model reads, by the name of its option, how
            many of its tokens were kept, such as ``512 of 1305``.
        forwards: of the denoiser.
        predicted: steps, from 1, whose velocities a step cache predicted.
        cache: plan of the step cache.
    """

    options: ResolvedRun
    stages: tuple[Stage, ...]
    path: Path | None
    frames: Pixels | None
    cut: dict[str, str] = field(default_factory=dict)
    forwards: int = 0
    predicted: tuple[int, ...] = ()
    cache: CachePlan | None = None


class Pipeline:
    """Generates videos from one bundle."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        vram_budget: int | None = None,
        memory: int | None = None,
        provider: str = AUTO,
        fallback: bool = False,
    ) -> None:
        """Prepare to run ``bundle``.

        Args:
            bundle: an opened, checked bundle.
            threads: threads of the processor; None takes all cores.
            vram_budget: most bytes of the GPU's memory to take; None takes what is free.
            memory: most bytes of the host's memory to take; None takes what is free.
            provider: of ONNX Runtime, such as ``openvino``; see
                :func:`wanx.runtime.sessions.open_session`.
            fallback: go on on the processor where the provider fails.

        Raises:
            UsageError: a budget was given for a bundle that cannot keep to one, there are more
                threads than any machine needs, or there is no such provider.
            EnvironmentMismatchError: the provider is not installed.
        """
        require_between("threads", threads, 1, MAX_THREADS)
        require_provider(provider, fallback=fallback)
        if vram_budget is not None:
            require_budget(bundle.manifest.target, provider)
        self.bundle = bundle
        self.config = bundle.manifest.config
        self.threads = threads
        self.vram_budget = vram_budget
        self.memory = memory
        self.provider = provider
        self.fallback = fallback

    def __call__(self, prompt: str | None = None, **options: Any) -> Generation:
        """Generate a video in memory; keywords are those of :class:`RunOptions` and :meth:`run`."""
        runtime = {k: options.pop(k) for k in _RUNTIME_KEYWORDS & options.keys()}
        return self.run(RunOptions(prompt=prompt, **options), **runtime)

    def plan(self, options: RunOptions) -> RunPlan:
        """Decide the options of a run, memory and time of its stages, without running it.

        Raises:
            UsageError: an option cannot be, or the memory does not suffice.
        """
        run = resolve(options, self.config, read_inputs(options, self.config.task))
        provider = effective_provider(self.provider, fallback=self.fallback)
        return plan_run(self.bundle, run, self._plan_memory(run), provider)

    def run(
        self,
        options: RunOptions,
        *,
        output: str | Path | None = None,
        overwrite: bool = True,
        on_step: OnStep | None = None,
        cancelled: Callable[[], bool] = lambda: False,
        progress: Progress = no_progress,
    ) -> Generation:
        """Generate a video.

        Args:
            options: of the video.
            output: file to write, in the format of its extension; None returns the frames.
            overwrite: whether a file of that name may be replaced.
            on_step: called after each denoising step with its number (from 1), the number of
                steps, and the latent ``[C, T, h, w]``.
            cancelled: asked between steps and decoded frames; True ends the run.
            progress: called with how far each stage is.

        Raises:
            UsageError: an option or the output cannot be.
            CancelledError: ``cancelled`` said so; no file was left behind.
            WanxError: the output is not finite, black or frozen, or the machine cannot do it.
        """
        inputs = read_inputs(options, self.config.task)
        run = resolve(options, self.config, inputs)
        path = None
        if output is not None:
            path = check_output(
                output, width=run.width, height=run.height, frames=run.frames, overwrite=overwrite
            )
            self._writer(path, run, {})  # refuses now what the format cannot hold
        self._plan_memory(run)
        if warning := prompt_warning(self.bundle.manifest, run.prompt):
            _log.warning(warning)
        self._suggest_preset(run)
        parts = RunParts.of(
            self.bundle,
            threads=self.threads,
            vram_budget=self.vram_budget,
            memory=self.memory,
            provider=self.provider,
            fallback=self.fallback,
        )
        timer = parts.timer
        cut: dict[str, str] = {}

        def on_cut(option: str, kept: int, tokens: int) -> None:
            cut[option] = f"{kept} of {tokens}"

        cache = plan_cache(self.bundle, run)
        if cache is not None:
            _log.info(cache.summary)
        with timer.stage("text"):
            on_prompt = step_counter(progress, "encode text", len(prompts_by_branch(run)))
            (contexts,) = parts.encode_prompts([run], on_prompt, on_cut=on_cut)
        _stop_if(cancelled)
        conditioning = Conditioning()
        if self.config.task != "t2v":
            with timer.stage("condition"):
                conditioning = parts.condition(run, inputs)
            _stop_if(cancelled)
        with timer.stage("denoise"):
            encoded = EncodedRun(
                run=run, config=self.config, contexts=contexts, conditioning=conditioning,
                cache=cache,
            )  # fmt: skip
            denoising = encoded.start()
            latent = _denoise(parts, denoising, cache, on_step, cancelled, progress)
        steps = forward_facts(denoising, cache)
        with timer.stage("decode"):
            frames = _decode(parts, latent, cancelled, progress)
            if path is None:
                pixels = np.concatenate(list(frames))
            else:
                pixels = None
                kept = {f"{option}_tokens": text for option, text in cut.items()}
                _write(frames, self._writer(path, run, kept | steps), timer)
        return Generation(
            options=run, stages=tuple(timer.stages), path=path, frames=pixels, cut=cut,
            forwards=denoising.forwards, cache=cache,
            predicted=tuple(step + 1 for step in denoising.predicted),
        )  # fmt: skip

    def _suggest_preset(self, run: ResolvedRun) -> None:
        """Say in one line where the weights look distilled and the run is not that of few steps."""
        if run.preset is not None or run.sigmas is not None:
            return
        source = self.bundle.manifest.provenance
        names = [*(lora.file for lora in source.loras), source.source]
        if found := suggest_preset(names, self.config.task):
            name, preset = found
            _log.info("%s looks distilled to few steps; try --preset %s", name, preset.name)

    def _plan_memory(self, run: ResolvedRun) -> tuple[StageMemory, ...]:
        """Memory of the stages of a run; refuses what does not fit."""
        manifest = self.bundle.manifest
        require_parts(self.bundle.root, manifest)
        stages = plan_memory(
            manifest,
            run,
            limit=self.memory,
            vram_budget=self.vram_budget,
            provider=effective_provider(self.provider, fallback=self.fallback),
        )
        return tuple(stages)

    def provenance(self, run: ResolvedRun) -> dict[str, str]:
        """Say in the video's metadata how to make it again."""
        from wanx.version import __version__

        manifest = self.bundle.manifest
        facts = {
            "software": f"wanx {__version__}",
            "model": manifest.name,
            "precision": manifest.precision,
            "bundle": self.bundle.hash,
        }
        options = {name: value for name, value in asdict(run).items() if value is not None}
        return facts | {name: str(value) for name, value in options.items()}

    def _writer(self, path: Path, run: ResolvedRun, facts: Mapping[str, str]) -> VideoWriter:
        """Prepare to write a run's video; refuses what the format cannot hold, opens nothing."""
        metadata = {**self.provenance(run), **facts}
        return VideoWriter(path, run.width, run.height, fps=run.fps, metadata=metadata)


_RUNTIME_KEYWORDS = {"output", "overwrite", "on_step", "cancelled", "progress"}


def _stop_if(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise CancelledError("the run was cancelled; no file was written")


def _denoise(
    parts: RunParts,
    denoising: DenoisingRun,
    cache: CachePlan | None,
    on_step: OnStep | None,
    cancelled: Callable[[], bool],
    progress: Progress,
) -> Float32:
    stage = "denoise" if cache is None else f"denoise, {cache.label}"
    count_step = step_counter(progress, stage, denoising.steps)

    def after_step(*_: object) -> None:
        count_step()
        if on_step is not None:
            on_step(denoising.steps_done, denoising.steps, denoising.latent)
        _stop_if(cancelled)

    with parts.session("dit") as session:
        return parts.denoise(session, denoising, after_step)


def _decode(
    parts: RunParts, latent: Float32, cancelled: Callable[[], bool], progress: Progress
) -> Iterator[Pixels]:
    check = FrameCheck()
    plan = parts.vae_plan("vae_decoder_up", latent.shape[1:])
    count_call = step_counter(progress, "decode", len(plan.tiling.tiles) * latent.shape[1])

    def after_call() -> None:
        count_call()
        _stop_if(cancelled)

    for pixels in parts.decode(latent, check.convert, after_call, plan):
        check.update(pixels)
        yield pixels
    check.finish()


def _write(frames: Iterator[Pixels], writer: VideoWriter, timer: StageTimer) -> None:
    """Write frames in a thread while the next ones are decoded."""
    with ExitStack() as stack:
        with timer.writing():
            stack.enter_context(writer)
        pool = ThreadPoolExecutor(1, "wanx-writer")
        stack.callback(pool.shutdown)
        writing: Future[None] | None = None
        try:
            for chunk in frames:
                if writing is not None:
                    with timer.writing():
                        result_of(writing)
                writing = pool.submit(writer.write, chunk)
            with timer.writing():
                if writing is not None:
                    result_of(writing)
        finally:
            # However often Ctrl-C comes: the file must not be closed under its writer.
            while writing is not None and not writing.done():
                with suppress(KeyboardInterrupt):
                    wait([writing], 1)
        with timer.writing():
            stack.close()
