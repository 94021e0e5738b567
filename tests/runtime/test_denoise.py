"""One video step by step, against the loop written out, torch and a flow with a known solution.

Whole trajectories with a network in them are compared with diffusers in test_end_to_end.py and
test_tasks.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from wanx.builtin import builtin_bundle
from wanx.bundle.manifest import TOKENIZER
from wanx.config.models import PRESETS, ModelConfig
from wanx.errors import UsageError, WanxError
from wanx.runtime.denoise import DenoisingRun
from wanx.runtime.inputs.conditioning import Conditioning
from wanx.runtime.options import ResolvedRun
from wanx.runtime.sampling.guidance import Branch
from wanx.runtime.sampling.solvers import make_sampler
from wanx.runtime.sessions.base import Session
from wanx.runtime.text import PromptTokenizer, encode_prompt

Float32 = NDArray[np.float32]
Triple = tuple[int, int, int]
Field = Callable[[Float32, float], Float32]  # latent and timestep to velocity

CONFIG = PRESETS["tiny"]
SHAPE = (16, 3, 10, 6)  # of the latent of RUN
RUN = ResolvedRun(
    prompt="", negative_prompt="", width=48, height=80, frames=9, fps=16, steps=5,
    guide_scale=5.0, shift=3.0, solver="unipc", seed=3,
)  # fmt: skip
BOTH: tuple[Branch, Branch] = ("conditional", "unconditional")
CONTEXTS: dict[Branch, Float32] = {
    branch: np.full((1, 4, 2), index, np.float32) for index, branch in enumerate(BOTH)
}
NOTHING = Conditioning()


def patched(patch: Triple) -> ModelConfig:
    return replace(CONFIG, dit=replace(CONFIG.dit, patch_size=patch))


def random(*shape: int, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def noise(shape: tuple[int, ...], seed: int) -> Float32:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).numpy()


def cells(shape: tuple[int, ...], patch: Triple) -> list[tuple[slice, ...]]:
    """Where each token lies in a latent: over time, then height, then width."""
    corners = np.ndindex(*(size // side for size, side in zip(shape[1:], patch, strict=True)))
    return [
        (slice(None), *(slice(c * s, (c + 1) * s) for c, s in zip(corner, patch, strict=True)))
        for corner in corners
    ]


def head_tokens(velocity: Float32, patch: Triple) -> Float32:
    """[L, patch cells · C], the channels fastest, as the network's head writes a velocity."""
    rows = [velocity[c].transpose(1, 2, 3, 0).ravel() for c in cells(velocity.shape, patch)]
    return np.stack(rows)


def body_latent(tokens: Float32, shape: tuple[int, ...], patch: Triple) -> Float32:
    """The latent in tokens [L, C · patch cells], the channels slowest."""
    latent = np.full(shape, np.nan, np.float32)
    for row, cell in zip(tokens, cells(shape, patch), strict=True):
        latent[cell] = row.reshape(latent[cell].shape)
    return latent


FIELDS: dict[Branch, Field] = {
    "conditional": lambda x, t: np.sin(3 * x) + np.float32(t / 1000) * x,
    "unconditional": lambda x, t: np.float32(0.4) * x - np.float32(t / 5000),
}


def answers(
    video: DenoisingRun, fields: Mapping[Branch, Field] = FIELDS, patch: Triple = (1, 2, 2)
) -> dict[Branch, Float32]:
    """What a network that computes ``fields`` says to the feeds, from nothing but the feeds."""
    velocities: dict[Branch, Float32] = {}
    for branch, feeds in video.feeds().items():
        assert feeds["context"] is CONTEXTS[branch]
        latent = body_latent(feeds["tokens"][0], video.latent.shape, patch)
        velocity = fields[branch](latent, float(feeds["timestep"][0]))
        velocities[branch] = head_tokens(velocity, patch)[None]
    return velocities


def finish(video: DenoisingRun, **options: Any) -> Float32:
    while not video.done:
        video.advance(answers(video, **options))
    return video.result


def loop_written_out(run: ResolvedRun, latent: Float32) -> list[Float32]:
    """The latent after each step: guidance and sampler around the fields, on whole latents."""
    sampler = make_sampler(run.solver, run.steps, run.shift)
    latents = []
    for timestep in sampler.timesteps:
        c, u = (FIELDS[branch](latent, timestep) for branch in BOTH)
        if run.guide_scale in (0, 1):
            velocity = c if run.guide_scale else u
        else:
            velocity = u + np.float32(run.guide_scale) * (c - u)
        latent = sampler.step(velocity, latent)
        latents.append(latent)
    return latents


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
@pytest.mark.parametrize("scale", [-1.5, 0.0, 0.5, 1.0, 5.0])
@pytest.mark.parametrize("patch", [(1, 2, 2), (3, 1, 2)])
def test_equals_the_loop_written_out(solver: str, scale: float, patch: Triple) -> None:
    run = replace(RUN, solver=solver, guide_scale=scale)
    start = random(*SHAPE)
    video = DenoisingRun(run, CONTEXTS, NOTHING, patched(patch), latent=start)
    for step, expected in enumerate(loop_written_out(run, start), 1):
        latent = video.advance(answers(video, patch=patch))
        assert latent is video.latent
        assert latent.dtype == np.float32
        np.testing.assert_array_equal(latent, expected)
        assert (video.steps_done, video.done) == (step, step == run.steps)
    assert video.done
    np.testing.assert_array_equal(video.result, expected)
    np.testing.assert_array_equal(start, random(*SHAPE))  # the caller's latent is left alone


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_flow_with_a_known_solution(solver: str, scale: float) -> None:
    """Data of N(μ, 1) in each latent cell, with another μ in each cell and branch.

    The velocity is linear in μ, so the guided one is that of μ_u + γ(μ_c - μ_u); along a solution
    the standardised latent does not change.
    """
    run = replace(RUN, solver=solver, guide_scale=scale, steps=200)
    means = {branch: 0.2 * random(*SHAPE, seed=seed) for seed, branch in enumerate(BOTH, 7)}
    sigmas = make_sampler(solver, run.steps, run.shift).sigmas
    video = DenoisingRun(run, CONTEXTS, NOTHING, CONFIG, latent=random(*SHAPE))

    def field(mean: Float32) -> Field:
        def velocity(latent: Float32, timestep: float) -> Float32:
            s = float(sigmas[video.steps_done])
            assert 0 <= 1000 * s - timestep < 1
            residual = (latent - (1 - s) * mean) / ((1 - s) ** 2 + s**2)
            return (latent - mean - (1 - s) * residual) / np.float32(s)

        return velocity

    guided = means["unconditional"] + scale * (means["conditional"] - means["unconditional"])
    s = float(sigmas[0])
    solution = guided + (random(*SHAPE) - (1 - s) * guided) / math.hypot(1 - s, s)
    result = finish(video, fields={branch: field(mean) for branch, mean in means.items()})
    np.testing.assert_allclose(result, solution, rtol=0, atol=5e-3)


def test_published_timesteps() -> None:
    """The table of the reference implementation for 50 steps and shift 5."""
    video = DenoisingRun(replace(RUN, steps=50, shift=5.0), CONTEXTS, NOTHING, CONFIG)
    assert video.steps == 50
    timesteps = []
    while not video.done:
        timesteps.append(video.timestep)
        for feeds in video.feeds().values():
            assert feeds["timestep"].dtype == np.float32
            np.testing.assert_array_equal(feeds["timestep"], [video.timestep])
        video.step(np.zeros(SHAPE, np.float32))
    assert timesteps[:4] == [999, 995, 991, 987]
    assert timesteps[-3:] == [241, 172, 92]
    assert isinstance(timesteps[0], float)


@pytest.mark.parametrize("references", [0, 2])
def test_noise_is_that_of_torch(references: int) -> None:
    """References lengthen the video, so its noise is another one."""
    video = DenoisingRun(RUN, CONTEXTS, Conditioning(references=references), CONFIG)
    expected = noise((16, 3 + references, 10, 6), RUN.seed)
    np.testing.assert_allclose(video.latent, expected, rtol=0, atol=4e-6)
    assert video.latent.dtype == np.float32


@pytest.mark.parametrize("references", [1, 2])
def test_references_are_denoised_and_cut(references: int) -> None:
    start = random(16, 3 + references, 10, 6)
    conditioning = Conditioning(references=references)
    video = DenoisingRun(RUN, CONTEXTS, conditioning, CONFIG, latent=start)
    assert video.feeds()["conditional"]["tokens"].shape == (1, (3 + references) * 5 * 3, 64)
    result = finish(video)
    expected = loop_written_out(RUN, start)[-1]
    np.testing.assert_array_equal(video.latent, expected)
    assert result.shape == SHAPE
    np.testing.assert_array_equal(result, expected[:, references:])


def test_channels_stand_behind_the_latent() -> None:
    """At every step anew, behind a latent that has moved on."""
    channels = random(20, *SHAPE[1:], seed=9)
    video = DenoisingRun(RUN, CONTEXTS, Conditioning(channels=channels), CONFIG)
    for _ in range(2):
        for feeds in video.feeds().values():
            assert feeds["tokens"].shape == (1, 3 * 5 * 3, 36 * 4)
            whole = body_latent(feeds["tokens"][0], (36, *SHAPE[1:]), (1, 2, 2))
            np.testing.assert_array_equal(whole[:16], video.latent)
            np.testing.assert_array_equal(whole[16:], channels)
        before = video.latent
        video.step(random(*SHAPE, seed=video.steps_done))
        assert not np.array_equal(video.latent, before)


def test_constants() -> None:
    """A token's angle is its position times θ^(-2k/d): the first pair of an axis turns by 1 each.

    The rotary dimensions of a head of 32 are 12, 10 and 10.
    """
    hints = random(1, 75, 8)
    conditioning = Conditioning(references=2, constants={"vace_tokens": hints})
    video = DenoisingRun(RUN, CONTEXTS, conditioning, CONFIG)
    assert video.constants.keys() == {"rope_cos", "rope_sin", "vace_tokens"}
    assert video.constants["vace_tokens"] is hints
    positions = np.array(list(np.ndindex(5, 5, 3)))
    for name, function in (("rope_cos", np.cos), ("rope_sin", np.sin)):
        table = video.constants[name]
        assert table.shape == (75, 16)
        np.testing.assert_allclose(table[:, [0, 6, 11]], function(positions), atol=1e-7)


@pytest.mark.parametrize(("scale", "branch"), [(0.0, "unconditional"), (1.0, "conditional")])
def test_one_branch_is_enough(scale: float, branch: Branch) -> None:
    """The context of the other one may be there or not; its velocity is not asked for."""
    run = replace(RUN, guide_scale=scale)
    results = []
    for contexts in (CONTEXTS, {branch: CONTEXTS[branch]}):
        video = DenoisingRun(run, contexts, NOTHING, CONFIG)
        assert list(video.feeds()) == [branch]
        velocity = random(*SHAPE, seed=5)
        guided = video.apply_guidance({branch: head_tokens(velocity, (1, 2, 2))})
        np.testing.assert_array_equal(guided, velocity)
        results.append(finish(video))
    np.testing.assert_array_equal(*results)


def test_branches_in_order() -> None:
    """The prompt first, whatever the order of the contexts; the tokens are cut only once."""
    backwards = {branch: CONTEXTS[branch] for branch in reversed(BOTH)}
    feeds = DenoisingRun(RUN, backwards, NOTHING, CONFIG).feeds()
    assert tuple(feeds) == BOTH
    assert feeds["conditional"]["tokens"] is feeds["unconditional"]["tokens"]
    for branch in BOTH:
        assert feeds[branch].keys() == {"tokens", "timestep", "context"}


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
@pytest.mark.parametrize("scale", [0.0, 5.0])
def test_replay_of_stored_velocities(solver: str, scale: float) -> None:
    run = replace(RUN, solver=solver, guide_scale=scale)
    conditioning = Conditioning(references=1)
    recorded = DenoisingRun(run, CONTEXTS, conditioning, CONFIG)
    stored, latents = [], []
    while not recorded.done:
        before, step = recorded.latent, recorded.steps_done
        velocity = recorded.apply_guidance(answers(recorded))
        assert recorded.latent is before  # asking takes no step
        assert recorded.steps_done == step
        stored.append(velocity.copy())
        latents.append(recorded.advance(answers(recorded)).copy())
    replayed = DenoisingRun(run, CONTEXTS, conditioning, CONFIG)
    for velocity, expected in zip(stored, latents, strict=True):
        np.testing.assert_array_equal(replayed.step(velocity), expected)
    assert replayed.done
    np.testing.assert_array_equal(replayed.result, recorded.result)


def test_videos_in_lockstep_do_not_meet() -> None:
    """Interleaved step by step, each is what it is alone; they may differ in length and size."""
    runs = [
        RUN,
        replace(RUN, seed=4, solver="dpm++", steps=3, guide_scale=1.0),
        replace(RUN, seed=5, width=64, frames=1, steps=4),
    ]
    together = [DenoisingRun(run, CONTEXTS, NOTHING, CONFIG) for run in runs]
    while not all(video.done for video in together):
        for video in together:
            if not video.done:
                video.advance(answers(video))
    for run, video in zip(runs, together, strict=True):
        alone = finish(DenoisingRun(run, CONTEXTS, NOTHING, CONFIG))
        np.testing.assert_array_equal(video.result, alone)
        assert video.steps_done == run.steps


def test_a_batch_of_one_or_none() -> None:
    videos = [DenoisingRun(RUN, CONTEXTS, NOTHING, CONFIG) for _ in range(2)]
    batched = answers(videos[0])
    flat = {branch: velocity[0] for branch, velocity in batched.items()}
    np.testing.assert_array_equal(videos[0].advance(batched), videos[1].advance(flat))


def test_noise_levels_of_a_list() -> None:
    run = replace(RUN, solver="dpm++", steps=3, sigmas=(0.9, 0.5, 0.2))
    video = DenoisingRun(run, CONTEXTS, NOTHING, CONFIG)
    assert (video.steps, video.timestep) == (3, 900)
    start, velocity = video.latent.copy(), random(*SHAPE)
    # A first step of order 1 moves along a straight line.
    expected = start + np.float32(0.5 - 0.9) * velocity
    np.testing.assert_allclose(video.step(velocity), expected, rtol=0, atol=2e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("branch", BOTH)
def test_a_velocity_that_is_not_finite(value: float, branch: Branch) -> None:
    video = DenoisingRun(RUN, CONTEXTS, NOTHING, CONFIG)
    video.advance(answers(video))
    good = video.latent
    velocities = answers(video)
    velocities[branch][0, 44, 63] = value
    with pytest.raises(WanxError, match="not finite after step 2 of 5; check the bundle") as caught:
        video.advance(velocities)
    assert "\n" not in str(caught.value)
    assert video.latent is good


def test_a_replayed_velocity_that_is_not_finite() -> None:
    video = DenoisingRun(replace(RUN, steps=1), CONTEXTS, NOTHING, CONFIG)
    with pytest.raises(WanxError, match="not finite after step 1 of 1"):
        video.step(np.full(SHAPE, np.nan, np.float32))


def test_misuse() -> None:
    with pytest.raises(ValueError, match=r"initial latent has shape \(16, 3, 6, 10\)"):
        DenoisingRun(RUN, CONTEXTS, NOTHING, CONFIG, latent=random(16, 3, 6, 10))
    with pytest.raises(UsageError, match="unknown solver"):
        DenoisingRun(replace(RUN, solver="heun"), CONTEXTS, NOTHING, CONFIG)
    with pytest.raises(KeyError, match="unconditional"):
        DenoisingRun(RUN, {"conditional": CONTEXTS["conditional"]}, NOTHING, CONFIG)
    video = DenoisingRun(replace(RUN, steps=1), CONTEXTS, NOTHING, CONFIG)
    tokens = random(45, 64)
    for branch in BOTH:
        with pytest.raises(ValueError, match="are needed"):
            video.apply_guidance({branch: tokens})
    for wrong in (random(44, 64), random(2, 45, 64)):
        with pytest.raises(ValueError, match=r"fill the grid|reshape"):
            video.advance(dict.fromkeys(BOTH, wrong))
    with pytest.raises(ValueError, match="differ in shape"):
        video.step(tokens)
    assert video.steps_done == 0
    video.advance(dict.fromkeys(BOTH, tokens))
    with pytest.raises(IndexError):
        video.feeds()
    with pytest.raises(ValueError, match="all 1 steps are done"):
        video.step(video.latent)


def test_prompts_to_contexts() -> None:
    """A network whose features are the ids themselves shows what it was given."""

    seen: list[int] = []

    class Echo:
        def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
            ids = feeds["ids"]
            seen.append(ids.shape[1])
            return {"features": np.repeat(ids[..., None], 3, axis=2).astype(np.float16)}

    tokenizer = PromptTokenizer(builtin_bundle() / TOKENIZER)
    long = "a red circle " * 20
    prompts: dict[Branch, str] = {"unconditional": " a  red &amp;amp; x\n", "conditional": long}
    cleaned: dict[Branch, str] = {"unconditional": "a red & x", "conditional": long.strip()}
    session = cast(Session, Echo())
    contexts = {
        branch: encode_prompt(session, tokenizer, text, 9) for branch, text in prompts.items()
    }
    for branch, text in cleaned.items():
        ids, mask = tokenizer.encode(text, 9)
        assert (contexts[branch].dtype, contexts[branch].shape) == (np.float32, (1, 9, 3))
        np.testing.assert_array_equal(contexts[branch][0, :, 0], (ids * mask)[0])
    assert seen == [int(tokenizer.encode(text, 9)[1].sum()) for text in cleaned.values()]
    assert seen[0] < 9 == seen[1]  # padding is left out
