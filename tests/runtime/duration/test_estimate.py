"""Time of stages, in multiply-adds by a rate that is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from wanx.builtin import open_named
from wanx.bundle.reader import Bundle
from wanx.runtime.duration.estimate import Durations, product_rate, stage_seconds
from wanx.runtime.options import ResolvedRun
from wanx.runtime.vae.memory import VaePlan
from wanx.runtime.vae.tiles import plan_tiles, whole

RUN = ResolvedRun(
    prompt="", negative_prompt="", width=512, height=256, frames=17, fps=16, steps=20,
    guide_scale=5.0, shift=3.0, solver="unipc", seed=0,
)  # fmt: skip


@pytest.fixture
def bundle() -> Bundle:
    return open_named("tiny", verify="size")


@pytest.fixture
def seconds(bundle: Bundle) -> Callable[..., dict[str, float]]:
    def estimate(
        provider: str = "cpu", plan: VaePlan | None = None, **options: object
    ) -> dict[str, float]:
        run = replace(RUN, **options)  # type: ignore[arg-type]
        # So slow a machine that loading does not count.
        durations = Durations(bundle.manifest, provider, rate=1e3)
        plans = {} if plan is None else {"decode": plan}
        return stage_seconds(bundle.manifest, run, [9, 4], durations, plans)

    return estimate


def test_every_stage(seconds: Callable[..., dict[str, float]]) -> None:
    assert set(seconds()) == {"text", "denoise", "decode"}


def test_steps_and_guidance(seconds: Callable[..., dict[str, float]]) -> None:
    full = seconds()["denoise"]
    assert seconds(steps=10)["denoise"] == pytest.approx(full / 2, rel=1e-3)
    assert seconds(guide_scale=1.0)["denoise"] == pytest.approx(full / 2, rel=1e-3)


def test_attention_grows_with_the_square(seconds: Callable[..., dict[str, float]]) -> None:
    few, many = seconds()["denoise"], seconds(width=1024)["denoise"]
    assert 2 * few < many < 4 * few
    # Attention of the VAE, within a frame of the latent, is little.
    assert seconds(width=1024)["decode"] == pytest.approx(2 * seconds()["decode"], rel=0.05)


def test_tiles_compute_some_work_again(seconds: Callable[..., dict[str, float]]) -> None:
    frames = VaePlan(tiling=whole(32, 64), provider="cpu")
    tiles = VaePlan(tiling=plan_tiles(32, 64, 13, 32 * 45), provider="cpu")
    assert tiles.tiling.overhead > 1
    ratio = seconds(plan=tiles)["decode"] / seconds(plan=frames)["decode"]
    assert ratio == pytest.approx(tiles.tiling.overhead)


def test_nothing_is_said_of_other_machines(seconds: Callable[..., dict[str, float]]) -> None:
    assert seconds(provider="cuda") == {}


def test_the_rate_of_products() -> None:
    assert 1e8 < product_rate() < 1e13
