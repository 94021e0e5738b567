"""Prompt to video: encode text and inputs, denoise the latent, decode the frames.

The components of a bundle are loaded, run and freed in turn, so that the memory of a run is that
of its largest component.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wanx.bundle.reader import Bundle
from wanx.errors import CancelledError
from wanx.progress import Progress, no_progress
from wanx.runtime.denoise import Trajectory
from wanx.runtime.inputs.conditioning import Conditioning, condition
from wanx.runtime.inputs.reading import read_inputs
from wanx.runtime.options import ResolvedRun, RunOptions, resolve
from wanx.runtime.output.checks import check_output
from wanx.runtime.output.frame_checks import FrameCheck
from wanx.runtime.output.video import VideoWriter
from wanx.runtime.sampling.guidance import Branch, branches
from wanx.runtime.sampling.sampler import make_sampler
from wanx.runtime.sessions import open_session
from wanx.runtime.sessions.base import Session, State
from wanx.runtime.sessions.device.vram_budget import require_streaming
from wanx.runtime.stages import Clock, Stage
from wanx.runtime.text import PromptTokenizer, encode_prompts

Float32 = NDArray[np.float32]
Pixels = NDArray[np.uint8]
OnStep = Callable[[int, int, Float32], None]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The result of a run.

    Attributes:
        options: every option that was used, the drawn seed among them.
        stages: what each part took.
        path: the file, when one was asked for.
        frames: the pixels ``[F, H, W, 3]``, when no file was asked for.
    """

    options: ResolvedRun
    stages: tuple[Stage, ...]
    path: Path | None
    frames: Pixels | None


class Pipeline:
    """Generates videos from one bundle."""

    def __init__(
        self, bundle: Bundle, *, threads: int | None = None, vram_budget: int | None = None
    ) -> None:
        """Prepare to run ``bundle``.

        Args:
            bundle: an opened, checked bundle.
            threads: threads of the processor; None takes all cores.
            vram_budget: most bytes of the GPU's memory to take; None takes what is free.

        Raises:
            UsageError: a budget was given for a bundle that cannot keep to one.
        """
        if vram_budget is not None:
            require_streaming(bundle.manifest.target)
        self.bundle = bundle
        self.config = bundle.manifest.config
        self.threads = threads
        self.vram_budget = vram_budget

    def __call__(self, prompt: str | None = None, **options: Any) -> Generation:
        """Generate a video in memory; keywords are those of :class:`RunOptions` and :meth:`run`."""
        runtime = {k: options.pop(k) for k in _RUNTIME_KEYWORDS & options.keys()}
        return self.run(RunOptions(prompt=prompt, **options), **runtime)

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
            options: what to generate.
            output: file to write, its format given by the extension; None returns the frames.
            overwrite: whether a file of that name may be replaced.
            on_step: called after each denoising step with its number (from 1), the number of
                steps, and the latent ``[C, T, h, w]``.
            cancelled: asked between steps and decoded frames; True ends the run.
            progress: told how far each stage is.

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
        clock = Clock()
        with clock.stage("text"):
            contexts = self._encode_text(run, clock, progress)
        _stop_if(cancelled)
        given = Conditioning()
        if self.config.task != "t2v":
            with clock.stage("condition"):
                given = condition(run, inputs, self.config, self._opener(clock))
            _stop_if(cancelled)
        with clock.stage("denoise"):
            latent = self._denoise(run, contexts, given, clock, on_step, cancelled, progress)
        with clock.stage("decode"):
            frames = self._decode(latent, clock, cancelled, progress)
            if path is None:
                pixels = np.concatenate(list(frames))
            else:
                pixels = None
                self._write(frames, path, run, clock)
        return Generation(options=run, stages=tuple(clock.stages), path=path, frames=pixels)

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

    def _write(self, frames: Iterator[Pixels], path: Path, run: ResolvedRun, clock: Clock) -> None:
        with ExitStack() as stack:
            with clock.writing():
                writer = stack.enter_context(
                    VideoWriter(
                        path, run.width, run.height, fps=run.fps, metadata=self.provenance(run)
                    )
                )
            for chunk in frames:
                with clock.writing():
                    writer.write(chunk)
            with clock.writing():
                stack.close()

    def _opener(self, clock: Clock) -> Callable[[str], Session]:
        def open_component(name: str) -> Session:
            with clock.loading():
                return open_session(
                    self.bundle, name, threads=self.threads, vram_budget=self.vram_budget
                )

        return open_component

    def _encode_text(
        self, run: ResolvedRun, clock: Clock, progress: Progress
    ) -> dict[Branch, Float32]:
        tokenizer = PromptTokenizer(self.bundle.tokenizer_path)
        texts: dict[Branch, str] = {
            "conditional": run.prompt,
            "unconditional": run.negative_prompt,
        }
        prompts = {branch: texts[branch] for branch in branches(run.guide_scale)}

        contexts: dict[Branch, Float32] = {}
        progress("encode text", 0, len(prompts), "steps")
        with self._opener(clock)("text_encoder") as session:
            for done, (branch, prompt) in enumerate(prompts.items(), 1):
                with clock.call():
                    contexts |= encode_prompts(
                        session, tokenizer, {branch: prompt}, self.config.dit.text_len
                    )
                progress("encode text", done, len(prompts), "steps")
        return contexts

    def _denoise(
        self,
        run: ResolvedRun,
        contexts: dict[Branch, Float32],
        given: Conditioning,
        clock: Clock,
        on_step: OnStep | None,
        cancelled: Callable[[], bool],
        progress: Progress,
    ) -> Float32:
        sampler = make_sampler(run.solver, run.steps, run.shift)
        video = Trajectory(run, contexts, given, self.config, sampler=sampler)
        progress("denoise", 0, video.steps, "steps")
        with self._opener(clock)("dit") as session:
            session.bind(video.constants)
            while not video.done:
                with clock.call():
                    feeds = video.feeds()
                    made = session.run_each(list(feeds.values()))
                    video.advance({b: out["velocity"] for b, out in zip(feeds, made, strict=True)})
                progress("denoise", video.step, video.steps, "steps")
                if on_step is not None:
                    on_step(video.step, video.steps, video.latent)
                _stop_if(cancelled)
        return video.result

    def _decode(
        self, latent: Float32, clock: Clock, cancelled: Callable[[], bool], progress: Progress
    ) -> Iterator[Pixels]:
        check = FrameCheck()
        state: State = {}
        count = latent.shape[1]
        progress("decode", 0, count, "steps")
        for name, chunks in (("first", range(1)), ("rest", range(1, count))):
            if not chunks:
                continue
            with self._opener(clock)(f"vae_decoder_{name}") as session:
                for index in chunks:
                    with clock.call():
                        part = np.ascontiguousarray(latent[None, :, index : index + 1])
                        pixels = check.convert(session.run({"latent": part}, state)["video"][0])
                    yield pixels
                    progress("decode", index + 1, count, "steps")
                    _stop_if(cancelled)
        check.finish()


_RUNTIME_KEYWORDS = {"output", "overwrite", "on_step", "cancelled", "progress"}


def _stop_if(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise CancelledError("the run was cancelled; no file was written")
