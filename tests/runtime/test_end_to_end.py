"""Prompt to video, end to end, against diffusers.WanPipeline from the same seed and checkpoint.

The two packages choose slightly different noise levels (diffusers starts its grid at 1, the
reference at .999), so one side has to take the other's: both ways are tested.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, WanPipeline
from numpy.typing import NDArray

import wanx
from tests.support.peers import SHIFT
from tests.support.videos import assert_same_video, levels_of, psnr
from wanx.bundle.reader import Bundle
from wanx.runtime.pipeline import Pipeline
from wanx.runtime.sampling.solvers import make_sampler

PROMPT = "A red  circle moving &amp;amp; the blue square, on the left."
NEGATIVE = "the right"
SMALL: dict[str, Any] = {"width": 48, "height": 32, "frames": 5, "steps": 3, "seed": 1}
Pixels = NDArray[np.uint8]


@pytest.fixture(scope="module")
def pipeline(bundle_fp32: Bundle) -> Pipeline:
    return wanx.load(bundle_fp32.root, threads=1)


def their_sigmas(steps: int) -> NDArray[np.float64]:
    """The noise levels of diffusers' UniPC, before it rounds them to float32."""
    grid = np.linspace(1, 0.001, steps + 1)[:-1]
    sigmas = SHIFT * grid / (1 + (SHIFT - 1) * grid)
    sigmas[0] -= 1e-6
    return np.append(sigmas, 0.0)


def run_peer(
    peer: WanPipeline,
    *,
    width: int,
    height: int,
    frames: int,
    steps: int,
    seed: int,
    guide_scale: float,
    prompt: str = PROMPT,
) -> tuple[Pixels, list[torch.Tensor]]:
    """Frames [F, H, W, 3] and the latent after each step."""
    latents = []

    def note(_: Any, step: int, timestep: int, values: dict[str, Any]) -> dict[str, Any]:
        latents.append(values["latents"][0])
        return values

    peer.set_progress_bar_config(disable=True)
    video = peer(
        prompt=prompt,
        negative_prompt=NEGATIVE,
        width=width,
        height=height,
        num_frames=frames,
        num_inference_steps=steps,
        guidance_scale=guide_scale,
        generator=torch.Generator().manual_seed(seed),
        callback_on_step_end=note,
    ).frames[0]
    return np.rint(video * 255).astype(np.uint8), latents


def run_ours(pipeline: Pipeline, **options: Any) -> tuple[Pixels, list[NDArray[np.float32]]]:
    latents: list[NDArray[np.float32]] = []
    options = {"prompt": PROMPT, "negative_prompt": NEGATIVE} | options
    if "sigmas" not in options:
        options["shift"] = SHIFT
    result = pipeline(**options, on_step=lambda step, steps, latent: latents.append(latent.copy()))
    assert result.frames is not None
    return result.frames, latents


@pytest.mark.parametrize(
    "size",
    [
        {"width": 80, "height": 48, "frames": 9, "steps": 6},
        {"width": 16, "height": 112, "frames": 1, "steps": 4},
        {"width": 48, "height": 80, "frames": 21, "steps": 2},
    ],
)
def test_video_equals_diffusers(
    size: dict[str, int], peer: WanPipeline, pipeline: Pipeline
) -> None:
    """diffusers' scheduler steps through our noise levels."""
    options = size | {"seed": 42, "guide_scale": 5.0}
    with levels_of(peer.scheduler, make_sampler("unipc", size["steps"], SHIFT)):
        theirs = run_peer(peer, **options)
    assert_same_video(run_ours(pipeline, **options), theirs)


@pytest.mark.parametrize("steps", [1, 7])
def test_video_on_the_levels_of_diffusers(
    steps: int, peer: WanPipeline, pipeline: Pipeline
) -> None:
    """diffusers as it comes; our sampler takes its noise levels."""
    options = {"width": 48, "height": 32, "frames": 5, "seed": 7, "guide_scale": 5.0}
    theirs = run_peer(peer, steps=steps, **options)
    sigmas = their_sigmas(steps)
    sampler = make_sampler("unipc", steps, SHIFT, sigmas=sigmas)
    assert sampler.timesteps == tuple(peer.scheduler.timesteps.tolist())
    assert_same_video(run_ours(pipeline, sigmas=tuple(sigmas[:-1].tolist()), **options), theirs)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_dpm_solver_equals_diffusers(peer: WanPipeline, pipeline: Pipeline) -> None:
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
    )
    other = WanPipeline(**{**peer.components, "scheduler": scheduler})
    options = SMALL | {"steps": 5, "guide_scale": 5.0}
    with levels_of(scheduler, make_sampler("dpm++", 5, SHIFT)):
        theirs = run_peer(other, **options)
    assert_same_video(run_ours(pipeline, solver="dpm++", **options), theirs)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_narrow_weights_equal_rounded_ones(
    precision: str, peer: WanPipeline, bundles: Callable[[str], Bundle]
) -> None:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    parts = dict(peer.components)
    for name in ("transformer", "text_encoder"):
        parts[name] = copy.deepcopy(parts[name])
        for parameter in parts[name].parameters():
            parameter.copy_(parameter.to(dtype))
    options = SMALL | {"guide_scale": 5.0}
    with levels_of(peer.scheduler, make_sampler("unipc", SMALL["steps"], SHIFT)):
        theirs = run_peer(WanPipeline(**parts), **options)
    ours = run_ours(wanx.load(bundles(precision).root, threads=1), **options)
    assert_same_video(ours, theirs)


def test_a_prompt_longer_than_the_text_encoder_reads(peer: WanPipeline, pipeline: Pipeline) -> None:
    prompt = "a red circle moving right, " * 150
    assert len(peer.tokenizer(prompt).input_ids) > 512
    options = SMALL | {"prompt": prompt, "guide_scale": 1.0}
    with levels_of(peer.scheduler, make_sampler("unipc", SMALL["steps"], SHIFT)):
        theirs = run_peer(peer, **options)
    assert_same_video(run_ours(pipeline, **options), theirs)


def test_guidance_of_zero_and_one(peer: WanPipeline, pipeline: Pipeline) -> None:
    """Zero ignores the prompt, one the negative prompt; diffusers guides only above one."""
    with levels_of(peer.scheduler, make_sampler("unipc", SMALL["steps"], SHIFT)):
        conditional = run_peer(peer, **SMALL, guide_scale=1.0)
        unconditional = run_peer(peer, **SMALL, guide_scale=1.0, prompt=NEGATIVE)
    assert_same_video(run_ours(pipeline, **SMALL, guide_scale=1.0), conditional)
    assert_same_video(run_ours(pipeline, **SMALL, guide_scale=0.0), unconditional)
    assert psnr(conditional[0], unconditional[0]) < 45
