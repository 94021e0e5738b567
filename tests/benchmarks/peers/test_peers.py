"""The pipeline of diffusers on the weights of a bundle, against wanx on the same bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wanx.benchmarks.peers import diffusers, requirements
from wanx.benchmarks.peers.agreement import agreement_of_runs
from wanx.benchmarks.peers.diffusers import generate
from wanx.benchmarks.peers.requirements import require_peer
from wanx.benchmarks.peers.weights import plain_weights
from wanx.builtin import find_bundle
from wanx.bundle.reader import Bundle, open_bundle
from wanx.errors import EnvironmentMismatchError, UsageError
from wanx.runtime.inputs.reading import Inputs
from wanx.runtime.inputs.video_input import open_video
from wanx.runtime.options import RunOptions
from wanx.runtime.output.video import VideoWriter
from wanx.runtime.pipeline import Pipeline
from wanx.runtime.resolve import resolve
from wanx.runtime.sampling.noise import randn


@pytest.fixture(scope="module")
def tiny() -> Bundle:
    return open_bundle(find_bundle("tiny"), allow_hard_links=True)


@pytest.mark.parametrize(("solver", "guide_scale"), [("unipc", 2.5), ("dpm++", 1.0)])
def test_a_peer_makes_the_same_video(
    tiny: Bundle, tmp_path: Path, solver: str, guide_scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[np.ndarray] = []

    class Recorder(VideoWriter):
        def write(self, frames: np.ndarray) -> None:
            written.append(frames)
            super().write(frames)

    monkeypatch.setattr(diffusers, "VideoWriter", Recorder)
    options = RunOptions(
        width=48, height=32, frames=5, steps=4, seed=1, solver=solver, guide_scale=guide_scale
    )
    run = resolve(options, tiny.manifest.config, Inputs())
    theirs = generate(tiny, run, compiled=False, threads=1, output=tmp_path / "theirs.mp4")
    latents = []
    ours = Pipeline(tiny).run(options, on_step=lambda *step: latents.append(step[2]))
    assert ours.frames is not None
    # Before the codec, which makes more of a rounding.
    videos = ours.frames, np.concatenate(written)
    assert len(open_video(tmp_path / "theirs.mp4").read(range(5), 32, 48)) == 5
    found = agreement_of_runs(
        randn(latents[0].shape, 1), (latents[0], latents[-1]),
        (theirs.first_latent, theirs.latent), (videos[0], videos[1]), subject=1, case=0,
    )  # fmt: skip
    assert found.first_step_cosine > 0.999999
    assert found.latent_cosine > 0.999999
    assert found.psnr_db_min is not None
    assert found.psnr_db_min > 40
    assert [stage.name for stage in theirs.stages] == ["text", "denoise", "decode", "write"]
    branches = 1 if guide_scale == 1 else 2
    assert [len(stage.calls) for stage in theirs.stages] == [branches, 4, 1, 1]
    assert all(stage.load_seconds > 0 for stage in theirs.stages[:3])


def test_a_peer_compiles_before_its_steps_are_timed(
    tiny: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def compile_quickly(module: torch.nn.Module, **how: Any) -> None:
        compiled(module, backend=lambda graph, _: events.append("compiled") or graph, **how)

    def interrupt(*arguments: Any) -> dict[str, Any]:
        events.append("a step before the timed ones")
        return interrupted(*arguments)

    compiled, interrupted = torch.nn.Module.compile, diffusers._interrupt
    monkeypatch.setattr(diffusers, "_interrupt", interrupt)
    monkeypatch.setattr(torch.nn.Module, "compile", compile_quickly)
    options = RunOptions(width=32, height=32, frames=1, steps=3, seed=1, guide_scale=2.0)
    run = resolve(options, tiny.manifest.config, Inputs())
    with torch._dynamo.config.patch(error_on_recompile=True):
        made = generate(tiny, run, compiled=True, threads=1, output=tmp_path / "compiled.png")
    plain = generate(tiny, run, compiled=False, threads=1, output=tmp_path / "plain.png")
    np.testing.assert_allclose(made.latent, plain.latent, atol=1e-5)
    denoise = made.stages[1]
    assert len(denoise.calls) == 3
    assert events[0] == "compiled"
    assert events.index("a step before the timed ones") == len(events) - 1


def test_agreement_sees_what_differs() -> None:
    draw = np.random.default_rng(0)
    noise, velocity, other = (draw.standard_normal((4, 2, 3, 3)).astype("f4") for _ in range(3))
    frames = np.full((2, 4, 4, 3), 100, np.uint8)
    worse = frames.copy()
    worse[1, 0, 0] += 10
    found = agreement_of_runs(
        noise, (noise - velocity, noise), (noise - 3 * velocity, other), (frames, worse),
        subject=1, case=2,
    )  # fmt: skip
    assert (found.subject, found.case) == (1, 2)
    assert found.first_step_cosine == pytest.approx(1)  # half the step has the same direction
    expected = float(np.vdot(noise, other) / np.linalg.norm(noise) / np.linalg.norm(other))
    assert found.latent_cosine == pytest.approx(expected, abs=1e-6)
    assert found.psnr_db_min == pytest.approx(10 * np.log10(255**2 / (100 * 3 / 48)))
    cut = agreement_of_runs(
        noise, (noise, noise), (noise, noise), (frames, worse[:1]), subject=1, case=0
    )
    assert cut.psnr_db_min is None


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_eight_bit_weights_become_floats(
    bundle_of: Callable[[str, str], Bundle], precision: str
) -> None:
    high = dict(plain_weights(bundle_of("t2v", "fp32"), "dit"))
    low = dict(plain_weights(bundle_of("t2v", precision), "dit"))
    assert low.keys() == high.keys()
    changed = [name for name in high if not torch.equal(high[name], low[name])]
    assert any("ffn" in name for name in changed)
    assert all(name.endswith(".weight") for name in changed)
    for name in changed:
        error = (low[name] - high[name]).norm() / high[name].norm()
        assert 1e-4 < error < 0.05, name


def test_what_a_peer_cannot(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch, bundle_of: Callable[[str, str], Bundle]
) -> None:
    require_peer(tiny)
    i2v = open_bundle(find_bundle("tiny-i2v"), allow_hard_links=True)
    with pytest.raises(UsageError, match="text-to-video only so far, and tiny_i2v is for i2v"):
        require_peer(i2v)
    monkeypatch.setattr(requirements, "find_spec", lambda name: None if name == "torch" else name)
    with pytest.raises(EnvironmentMismatchError, match=r"needs torch,.*wanx\[peers\]"):
        require_peer(tiny)
