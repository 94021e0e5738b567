"""Comparisons of bundles, against loops by hand, the pipeline's own videos, and known faults."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tokenizers
import torch
from numpy.typing import NDArray
from PIL import Image

import wanx
import wanx.runtime.denoise as denoise_module
import wanx.runtime.run_parts as run_parts_module
from tests.support.altered import altered_bundle, noise
from wanx.accuracy.gates import Agreement, Gates
from wanx.accuracy.metrics import MAX_DB, clip_figures
from wanx.benchmarks.accuracy.compare import CompareOptions, _encoded, compare
from wanx.benchmarks.accuracy.comparison import Comparison
from wanx.benchmarks.accuracy.step_recording import StepRecording
from wanx.benchmarks.report.files import dumps
from wanx.builtin import builtin_bundle
from wanx.bundle.reader import Bundle, open_bundle
from wanx.config.models import PRESETS
from wanx.errors import UsageError, WanxError
from wanx.runtime.inputs.conditioning import Conditioning
from wanx.runtime.options import RunOptions
from wanx.runtime.pipeline import Pipeline
from wanx.runtime.run_parts import EncodedRun
from wanx.runtime.sampling.noise import TorchGenerator
from wanx.runtime.sampling.solvers import make_sampler
from wanx.runtime.sessions.onnxruntime.providers import AUTO
from wanx.runtime.tokens import patchify

Array = NDArray[np.float32]

PROMPT = "a red circle moving right on a blue background"
SMALL: dict[str, Any] = {"width": 48, "height": 64, "frames": 5, "steps": 3, "seed": 2}
BRANCHES = ("conditional", "unconditional")


def options(**run: Any) -> CompareOptions:
    return CompareOptions(run=RunOptions(**SMALL | run), threads=1)


def opened(name: str) -> Bundle:
    return open_bundle(builtin_bundle(name), allow_hard_links=True)


@pytest.fixture(scope="module")
def tiny() -> Bundle:
    return opened("tiny")


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("noisy") / "noisy"
    return altered_bundle(folder, "dit", noise(0.05), prefix="blocks.")


@pytest.fixture(scope="module")
def found(noisy: Bundle, tiny: Bundle) -> Comparison:
    return compare(noisy, tiny, options())


def strictly(comparison: Comparison) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    document: dict[str, Any] = json.loads(dumps(comparison.to_json()), parse_constant=refuse)
    return document


def session(bundle: Bundle, component: str) -> onnxruntime.InferenceSession:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(bundle.root)
    )
    return onnxruntime.InferenceSession(bundle.graph_path(component).read_bytes(), settings)


def text_context(bundle: Bundle, prompt: str) -> Array:
    tokenizer = tokenizers.Tokenizer.from_file(str(bundle.tokenizer_path))
    tokenizer.no_padding()
    ids = np.array([tokenizer.encode(prompt).ids], np.int64)
    (features,) = session(bundle, "text_encoder").run(None, {"ids": ids})
    return np.pad(features, ((0, 0), (0, 512 - features.shape[1]), (0, 0)))


def angles(grid: tuple[int, ...], dims: tuple[int, ...]) -> NDArray[np.float64]:
    rows = [
        [
            place * 10000.0 ** (-2 * pair / dim)
            for place, dim in zip(at, dims, strict=True)
            for pair in range(dim // 2)
        ]
        for at in np.ndindex(grid)
    ]
    return np.array(rows)


def test_teacher_forced_velocities_are_those_of_a_loop_by_hand(
    found: Comparison, noisy: Bundle, tiny: Bundle
) -> None:
    """Two raw sessions fed the same; only the sampler is ours, and tested elsewhere."""
    run = found.runs[0].options
    c, t, h, w = 16, 2, run.height // 8, run.width // 8
    contexts = [text_context(tiny, text) for text in (PROMPT, run.negative_prompt)]
    phases = angles((t, h // 2, w // 2), tiny.manifest.config.dit.rope_dims)
    tables = {"rope_cos": np.cos(phases), "rope_sin": np.sin(phases)}
    fixed = {name: table.astype(np.float32) for name, table in tables.items()}
    theirs, ours = session(tiny, "dit"), session(noisy, "dit")
    sampler = make_sampler(run.solver, run.steps, run.shift)
    latent = torch.randn(c, t, h, w, generator=torch.Generator().manual_seed(run.seed)).numpy()
    expected = []
    for step, timestep in enumerate(sampler.timesteps, 1):
        cells = latent.reshape(c, t, h // 2, 2, w // 2, 2).transpose(1, 2, 4, 0, 3, 5)
        shared = fixed | {
            "tokens": np.ascontiguousarray(cells).reshape(1, -1, c * 4),
            "timestep": np.array([timestep], np.float32),
        }
        velocities = []
        for branch, context in zip(BRANCHES, contexts, strict=True):
            r, v = (
                net.run(["velocity"], shared | {"context": context})[0].astype(np.float64)
                for net in (theirs, ours)
            )
            cosine = (r * v).sum() / np.sqrt((r**2).sum() * (v**2).sum())
            sqnr = 10 * np.log10((r**2).sum() / ((v - r) ** 2).sum())
            expected.append((step, timestep, branch, cosine, sqnr))
            velocities.append(r[0])
        guided = velocities[1] + run.guide_scale * (velocities[0] - velocities[1])
        cells = guided.reshape(t, h // 2, w // 2, 2, 2, c).transpose(5, 0, 1, 3, 2, 4)
        latent = sampler.step(cells.reshape(c, t, h, w).astype(np.float32), latent)
    steps = found.runs[0].steps
    assert len(steps) == len(expected) == 6
    for at, (step, timestep, branch, cosine, sqnr) in zip(steps, expected, strict=True):
        assert (at.component, at.step, at.timestep, at.branch) == ("dit", step, timestep, branch)
        assert at.cosine == pytest.approx(cosine, abs=1e-5)
        assert at.sqnr_db == pytest.approx(sqnr, abs=0.05)
        assert 0.9 < at.cosine < 0.9999


def test_clips_are_those_of_the_pipeline(
    found: Comparison, noisy: Bundle, tiny: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def frames(bundle: Bundle) -> NDArray[np.uint8]:
        made = Pipeline(bundle, threads=1)(PROMPT, **SMALL).frames
        assert made is not None
        return made

    candidate, reference = frames(noisy), frames(tiny)

    class OneUlpUp(TorchGenerator):
        def randn(self, shape: Sequence[int]) -> NDArray[np.float32]:
            return np.nextafter(super().randn(shape), np.float32(np.inf))

    monkeypatch.setattr(denoise_module, "TorchGenerator", OneUlpUp)
    floor = frames(tiny)
    clip = found.runs[0].clip
    assert clip is not None
    assert clip.candidate == clip_figures(candidate, reference)
    assert clip.ulp_baseline == clip_figures(floor, reference)
    assert clip.ulp_baseline.rmse < clip.candidate.rmse
    assert clip.ratios["rmse"] == clip.candidate.rmse / clip.ulp_baseline.rmse
    labels = {still.label: still for still in clip.stills}
    assert [still.index for still in clip.stills][:2] == [0, 2]
    squared = np.square(candidate.astype(float) - reference).mean(axis=(1, 2, 3))
    (worst,) = (still for label, still in labels.items() if "worst" in label)
    assert worst.index == squared.argmax()
    assert np.array_equal(worst.candidate, candidate[worst.index])
    assert np.array_equal(worst.reference, reference[worst.index])
    assert np.array_equal(worst.ulp_baseline, floor[worst.index])


def test_guidance_that_changes_within_a_run(noisy: Bundle, tiny: Bundle) -> None:
    """Of each step those branches are compared that it needs."""
    run = RunOptions(
        prompt=PROMPT, seed=0, frames=1, steps=4, guide_scale="5@0-60%", cfg_zero=True, cache="2x"
    )
    found = compare(noisy, tiny, CompareOptions(run=run, clips=False, threads=1))
    steps = [(one.step, one.branch) for one in found.runs[0].steps]
    both = ("conditional", "unconditional")
    assert steps == [*[(2, b) for b in both], *[(3, b) for b in both], (4, "conditional")]


def test_a_bundle_equals_itself(tiny: Bundle) -> None:
    comparison = compare(tiny, tiny, options(guide_scale=1.0))
    (run,) = comparison.runs
    assert [part.component for part in run.parts] == ["text_encoder", "vae_decoder"]
    assert [step.branch for step in run.steps] == ["conditional"] * 3
    for at in (*run.parts, *run.steps):
        assert (at.cosine, at.sqnr_db, at.equal) == (1.0, MAX_DB, True)
    assert run.clip is not None
    assert set(run.clip.ratios.values()) <= {0.0, None}
    assert comparison.passed


def test_the_document(found: Comparison, noisy: Bundle, tiny: Bundle) -> None:
    document = strictly(found)
    assert (document["schema_version"], document["wanx_version"]) == (1, wanx.__version__)
    for role, bundle in (("candidate", noisy), ("reference", tiny)):
        assert document[role]["hash"] == bundle.hash
        assert document[role]["precision"] == bundle.manifest.precision
    assert document["environment"]["onnxruntime"] == onnxruntime.__version__
    assert document["environment"]["cpu"]
    (run,) = document["runs"]
    assert {name: run["options"][name] for name in SMALL} == SMALL
    assert run["options"]["prompt"] == PROMPT
    assert [(step["step"], step["branch"]) for step in run["steps"]] == [
        (step, branch) for step in (1, 2, 3) for branch in BRANCHES
    ]
    assert run["clip"]["candidate"]["rmse"] > 0
    assert document["passed"] is found.passed


def test_one_network_in_memory_at_a_time(
    noisy: Bundle, tiny: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    opener, now, ever = run_parts_module.open_session, [], []

    def watched(bundle: Bundle, component: str, *, threads: int | None, **options: object) -> Any:
        assert not any(value for value in options.values() if value != AUTO)
        assert now == [], "two networks in memory at once"
        assert threads == 1
        made = opener(bundle, component, threads=threads)
        close = made.close
        now.append(component)
        ever.append(component)
        monkeypatch.setattr(made, "close", lambda: (now.clear(), close()), raising=False)
        return made

    monkeypatch.setattr(run_parts_module, "open_session", watched)
    told: dict[str, list[tuple[int, int]]] = {}
    chosen = replace(options(steps=2), clips=False)
    comparison = compare(
        noisy,
        tiny,
        chosen,
        lambda stage, done, total, unit: told.setdefault(stage, []).append((done, total)),
    )
    assert now == []
    parts = ("mid_first", "mid_rest", "up_first", "up_rest")
    decoder = [f"vae_decoder_{part}" for part in parts]
    assert ever == ["text_encoder", "text_encoder", "dit", "dit", *decoder, *decoder]
    assert comparison.runs[0].clip is None
    steps = [(0, 2), (1, 2), (2, 2)]
    assert told == {
        "reference text": [(0, 1), (1, 1)],
        "candidate text": [(0, 1), (1, 1)],
        "reference steps": steps,
        "candidate steps": steps,
        "decode": [(0, 1), (1, 1)],
    }


FAULTS: dict[str, tuple[str, str, Callable[[Array], Array], str]] = {
    "text": ("text_encoder", "blocks.", noise(3.0), "text features"),
    "decoder": ("vae", "decoder.", noise(0.1), "decoded frames"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_from_its_consequences(fault: str, tiny: Bundle, tmp_path: Path) -> None:
    """A bad text encoder changes the video, and yet nothing is said against the DiT."""
    weights, prefix, change, output = FAULTS[fault]
    bad = altered_bundle(tmp_path / "bad", weights, change, prefix=prefix)
    comparison = compare(bad, tiny, options())
    assert comparison.problems
    assert all(f": {output}" in problem for problem in comparison.problems)
    assert all(step.equal for step in comparison.runs[0].steps)
    clip = comparison.runs[0].clip
    assert clip is not None
    assert clip.candidate.rmse > 10 * clip.ulp_baseline.rmse


def test_encoders_of_images(tmp_path: Path) -> None:
    tiny = opened("tiny-i2v")
    bad = altered_bundle(tmp_path / "bad", "image_encoder", noise(3.0), model="tiny-i2v")
    image = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    comparison = compare(bad, tiny, options(prompt=PROMPT, image=image, steps=1))
    parts = {part.component: part for part in comparison.runs[0].parts}
    assert [*parts] == ["text_encoder", "image_encoder", "vae_encoder", "vae_decoder"]
    assert parts["vae_encoder"].equal
    assert parts["image_encoder"].cosine < 0.98
    assert ["image features" in problem for problem in comparison.problems] == [True]
    assert all(step.equal for step in comparison.runs[0].steps)


def test_encoded_latents_are_compared_without_their_masks() -> None:
    """Masks are equal whatever the encoder does, and would hide what it does."""
    generator = np.random.default_rng(0)
    config = PRESETS["vace-1.3B"]
    hints = generator.standard_normal((96, 2, 4, 6)).astype(np.float32)
    masked = Conditioning(constants={"vace_tokens": patchify(hints)[None]})
    run: Any = None
    encoded = EncodedRun(run=run, config=config, contexts={}, conditioning=masked)
    assert np.array_equal(_encoded(encoded), patchify(hints[:32])[None])  # type: ignore[arg-type]
    channels = generator.standard_normal((20, 2, 4, 6)).astype(np.float32)
    encoded = EncodedRun(
        run=run,
        config=PRESETS["i2v-14B"],
        contexts={},
        conditioning=Conditioning(channels=channels),
    )
    assert np.array_equal(_encoded(encoded), channels[4:])  # type: ignore[arg-type]


def test_not_finite(tiny: Bundle, tmp_path: Path) -> None:
    broken = altered_bundle(
        tmp_path / "broken", "dit", lambda values: values * np.nan, prefix="head.head.bias"
    )
    comparison = compare(broken, tiny, options())
    (run,) = comparison.runs
    assert all(math.isnan(step.cosine) for step in run.steps)
    assert run.clip is None
    assert run.health == ("candidate: the latent is not finite after step 1 of 3",)
    assert "run 1: velocity, conditional: not finite at step 1" in comparison.problems[1]
    assert "3 of 3 steps" in comparison.problems[1]
    document = strictly(comparison)
    assert document["passed"] is False
    assert document["runs"][0]["steps"][0]["cosine"] is None
    with pytest.raises(WanxError, match="the latent of the reference is not finite after step 1"):
        compare(tiny, broken, options())


@pytest.mark.parametrize(
    ("value", "problem"), [(-5.0, "candidate: the video is black"), (math.nan, "NaN at frame 0")]
)
def test_health_of_the_video(value: float, problem: str, tiny: Bundle, tmp_path: Path) -> None:
    """Only the last layer of the decoder is at fault; its whole output becomes ``value``."""
    bad = altered_bundle(
        tmp_path / "bad", "vae", lambda v: np.full_like(v, value if v.size == 3 else 0.0),
        prefix="decoder.head.2.",
    )  # fmt: skip
    comparison = compare(bad, tiny, options())
    assert any(problem in line for line in comparison.runs[0].health)
    assert any(problem in line for line in comparison.problems)
    assert (comparison.runs[0].clip is None) == math.isnan(value)
    strictly(comparison)
    if math.isnan(value):
        with pytest.raises(WanxError, match="in the reference the VAE produced NaN"):
            compare(tiny, bad, options())
    else:
        assert "reference: the video is black" in compare(tiny, bad, options()).runs[0].health[0]


def test_different_models_are_refused(tiny: Bundle) -> None:
    with pytest.raises(UsageError, match="task is i2v in the candidate and t2v in the reference"):
        compare(opened("tiny-i2v"), tiny, options())
    config = tiny.manifest.config
    deeper = replace(config, name="deeper", dit=replace(config.dit, num_layers=7))
    other = replace(tiny, manifest=tiny.manifest.model_copy(update={"config": deeper}))
    with pytest.raises(UsageError, match=r"dit.num_layers is 7 in the candidate and 6 in the"):
        compare(other, tiny, options())


def test_other_names_and_defaults_are_not_another_model(tiny: Bundle) -> None:
    config = tiny.manifest.config
    renamed = replace(config, name="mine", defaults=replace(config.defaults, steps=9))
    other = replace(tiny, manifest=tiny.manifest.model_copy(update={"config": renamed}))
    chosen = CompareOptions(run=RunOptions(**SMALL | {"steps": None}), clips=False, threads=1)
    assert len(compare(tiny, other, chosen).runs[0].steps) == 18


def test_runs_from_a_file(noisy: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a blue square"}\n\n{"steps": 1, "size": "32x32", "seed": 9}\n')
    made = wanx.compare(
        noisy.root, "tiny", prompts=path, clips=False, threads=1, frames=1, steps=2
    )  # fmt: skip
    runs = [run.options for run in made.runs]
    assert [run.prompt for run in runs] == ["a blue square", PROMPT]
    assert [(run.steps, run.width, run.frames, run.seed) for run in runs] == [
        (2, 64, 1, 0),
        (1, 32, 1, 9),
    ]
    assert [len(run.steps) for run in made.runs] == [4, 2]
    # A second run starts afresh: by itself it gives the same.
    alone = wanx.compare(
        noisy.root, "tiny", clips=False, threads=1, frames=1, steps=1, width=32, height=32, seed=9
    )
    assert made.runs[1].steps == alone.runs[0].steps


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"}\n{"stepz": 3}', "line 2: 'stepz' is not an option"),
        ('{"steps": 0}', "line 1: steps is 0"),
        ('{"image": "a.png"}', "line 1: a bundle for t2v takes no --image"),
        ("", "has no lines"),
    ],
)
def test_a_bad_file_is_refused_before_anything_runs(
    line: str, message: str, tiny: Bundle, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(line)
    with pytest.raises(UsageError, match=message):
        compare(tiny, tiny, replace(options(), prompts=path))


def test_images_come_with_their_lines(tmp_path: Path) -> None:
    tiny = opened("tiny-i2v")
    with pytest.raises(UsageError, match="name them with --prompts"):
        compare(tiny, tiny, options(prompt=PROMPT))
    Image.new("RGB", (48, 64), "red").save(tmp_path / "first.png")
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": PROMPT, "image": "first.png", "steps": 1}))
    chosen = replace(options(), prompts=path, clips=False)
    assert compare(tiny, tiny, chosen).passed


def step(number: int, cosine: float, branch: Any = "conditional") -> Agreement:
    return Agreement(
        component="dit", branch=branch, step=number, timestep=500.0, cosine=cosine, sqnr_db=12.34
    )


def test_what_fails_is_said_once_for_each_output(found: Comparison) -> None:
    steps = (step(1, 0.98), step(2, 0.991), step(3, 0.97), step(3, 0.9899, "unconditional"))
    part = Agreement(component="vae_decoder", cosine=0.9989, sqnr_db=20.0)
    run = replace(found.runs[0], steps=steps, parts=(part,), health=("frozen",))
    comparison = replace(found, runs=(found.runs[0], run))
    gates = Gates(dit=0.5)
    assert replace(comparison, gates=gates).problems == [
        "run 2: frozen",
        "run 2: decoded frames: cosine 0.99890 (20.0 dB) is below 0.999",
    ]
    assert [p for p in comparison.problems if p.startswith("run 2: velocity")] == [
        "run 2: velocity, conditional: cosine 0.97000 (12.3 dB) is below 0.99 at step 3 "
        "(timestep 500), at 2 of 3 steps",
        "run 2: velocity, unconditional: cosine 0.98990 (12.3 dB) is below 0.99 at step 3 "
        "(timestep 500), at 1 of 1 steps",
    ]
    assert not replace(comparison, runs=(run,)).passed


@pytest.mark.parametrize(
    ("precision", "failing"), [("int8", ["a"]), ("fp8", ["a", "b"]), ("bf16", [])]
)
def test_gates_of_layers(precision: str, failing: list[str], found: Comparison) -> None:
    candidate = replace(found.candidate, precision=precision)
    layers = {"a": 23.9, "b": 24.0, "c": 27.5}
    comparison = replace(found, candidate=candidate, layers=layers, gates=Gates(dit=0.0))
    assert [problem.split()[1] for problem in comparison.problems] == [f"{n}:" for n in failing]
    assert strictly(comparison)["layers"] == layers


def test_a_recording_gives_back_what_it_was_given(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    recording = StepRecording(tmp_path / "steps")
    given = []
    recording.append({}, {})  # a step that needs no network
    for _ in range(3):
        tokens, first, second = generator.standard_normal((3, 1, 5, 4)).astype(np.float32)
        shared = {"tokens": tokens, "timestep": np.array([7.0], np.float32)}
        velocities = {"unconditional": first, "conditional": second}
        recording.append(dict.fromkeys(BRANCHES, shared), velocities)  # type: ignore[arg-type]
        given.append((shared, velocities))
    assert [number for number, _, _ in recording] == [2, 3, 4]
    for (_, feeds, velocities), (shared, answers) in zip(recording, given, strict=True):
        assert [*velocities] == [*answers]
        for name, array in (feeds | dict(velocities)).items():  # type: ignore[operator]
            assert np.array_equal(array, (shared | answers)[name])
    shutil.rmtree(tmp_path / "steps")
    with pytest.raises(WanxError, match=r"step 5 .* set TMPDIR"):
        recording.append(dict.fromkeys(BRANCHES, shared), velocities)  # type: ignore[arg-type]
