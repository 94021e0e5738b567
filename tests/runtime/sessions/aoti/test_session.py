"""A bundle of compiled programs against the same bundle on ONNX Runtime, and who may load it."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import wanx
from wanx.benchmarks.accuracy.compare import CompareOptions, compare
from wanx.benchmarks.speed.suite import BenchOptions
from wanx.bundle.engine_schedule import SCHEDULE, EngineSchedule, read_schedule
from wanx.bundle.publish import record_files, write_manifest
from wanx.bundle.reader import Bundle, open_bundle
from wanx.bundle.trust import mark_trusted
from wanx.errors import CorruptInputError, EnvironmentMismatchError
from wanx.exporter.calibration.options import CalibrationOptions
from wanx.runtime.options import RunOptions
from wanx.runtime.pipeline import Pipeline
from wanx.runtime.sessions import open_session
from wanx.runtime.sessions.aoti.session import AotiSession
from wanx.runtime.sessions.base import Session, State
from wanx.runtime.tokens import rope_tables

HERE = re.escape(torch.__version__)
PROMPT = "a red circle moving right on a blue background"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The built-in model in fp8 and int8, compiled; its golden steps are passed."""
    return wanx.export(
        "tiny",
        tmp_path_factory.mktemp("aoti") / "bundle",
        precision="fp8",
        target="aoti",
        gate=True,
        calibration=CalibrationOptions(prompts=1, steps=3, golden_steps=2),
    )


def on_cpu(bundle: Bundle) -> Bundle:
    """The same files, run by ONNX Runtime."""
    return dataclasses.replace(
        bundle, manifest=bundle.manifest.model_copy(update={"target": "cpu"})
    )


def random_feeds(bundle: Bundle, grid: tuple[int, int, int], seed: int) -> dict[str, Any]:
    dit = bundle.manifest.config.dit
    generator = np.random.default_rng(seed)
    length = int(np.prod(grid))
    shapes = {"tokens": (1, length, dit.token_dim), "context": (1, dit.text_len, dit.text_dim)}
    feeds = {n: generator.standard_normal(s, dtype=np.float32) for n, s in shapes.items()}
    return feeds | {"timestep": np.array([generator.uniform(1, 999)], np.float32)}


def bind(session: Session, bundle: Bundle, grid: tuple[int, int, int]) -> None:
    cos, sin = rope_tables(grid, bundle.manifest.config.dit.rope_dims)
    session.bind({"rope_cos": cos, "rope_sin": sin})


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_it_is_what_the_export_says(compiled: Bundle) -> None:
    assert compiled.manifest.target == "aoti"
    for name, component in compiled.manifest.components.items():
        schedule = read_schedule(compiled.root / component.engines["aoti"])
        assert schedule.device == ("cpu" if not torch.cuda.is_available() else schedule.device)
        assert isinstance(open_session(on_cpu(compiled), name), Session)
    schedule = read_schedule(compiled.root / compiled.manifest.components["dit"].engines["aoti"])
    types = {w.dtype for program in schedule.programs.values() for w in program.weights}
    assert "F8_E4M3" in types
    packages = sum(p.stat().st_size for p in (compiled.root / "engines").rglob("dit/*.pt2"))
    weights = (compiled.root / "weights" / "dit.safetensors").stat().st_size
    assert weights > 8e5
    assert packages < 5e6 * len(schedule.programs)


@pytest.mark.parametrize("grid", [(5, 4, 4), (1, 3, 4), (2, 5, 3)])
def test_the_denoiser_at_any_length(compiled: Bundle, grid: tuple[int, int, int]) -> None:
    answers = []
    for bundle in (compiled, on_cpu(compiled)):
        with open_session(bundle, "dit") as session:
            assert isinstance(session, AotiSession) == (bundle is compiled)
            bind(session, compiled, grid)
            answers.append(session.run(random_feeds(compiled, grid, 0))["velocity"])
    # Both round to 8 bits; a few numbers fall on the other side.
    assert relative(*answers) < 0.05


def test_two_branches_at_once_are_each_alone(compiled: Bundle) -> None:
    grid = (2, 4, 4)
    feeds = [random_feeds(compiled, grid, seed) for seed in (1, 2)]
    with open_session(compiled, "dit") as session:
        bind(session, compiled, grid)
        alone = [session.run(feed)["velocity"] for feed in feeds]
        apart = relative(alone[0], alone[1])
        assert apart > 0.1
        schedule = session._runner.schedule
        for limit in (0, 1000):
            session._runner.schedule = schedule.model_copy(update={"max_batched_tokens": limit})
            for found, wanted in zip(session.run_each(feeds), alone, strict=True):
                assert found["velocity"].shape == wanted.shape
                assert relative(found["velocity"], wanted) < apart / 4


def test_text_and_carried_state(compiled: Bundle) -> None:
    ids = np.array([[7, 3, 9, 1]])
    latent = np.random.default_rng(0).standard_normal((1, 16, 1, 8, 8), dtype=np.float32)
    answers: list[list[np.ndarray]] = []
    for bundle in (compiled, on_cpu(compiled)):
        with open_session(bundle, "text_encoder") as session:
            made = [session.run({"ids": ids})["features"]]
        state: State = {}
        with open_session(bundle, "vae_decoder_first") as session:
            made.append(session.run({"latent": latent}, state)["video"])
        with open_session(bundle, "vae_decoder_rest") as session:
            for scale in (0.5, -1):
                made.append(session.run({"latent": latent * np.float32(scale)}, state)["video"])
        answers.append(made)
    for number, (found, wanted) in enumerate(zip(*answers, strict=True)):
        assert found.shape == wanted.shape
        # On the processor, the activations of a text encoder in 8 bits have 14.
        assert relative(found, wanted) < (1e-3 if number == 0 else 1e-4)


def test_operators_are_timed(compiled: Bundle) -> None:
    """On the processor PyTorch sees no kernel inside a program, but every operator beside it."""
    matrix = torch.ones(64, 64)
    with open_session(compiled, "dit") as session:
        found = session.kernel_times(lambda: [matrix @ matrix for _ in range(3)])
    (product,) = [time for time in found if time.name == "aten::mm"]
    assert product.calls == 3
    assert 0 < product.seconds < 1


def test_a_benchmark_of_programs(compiled: Bundle, tmp_path: Path) -> None:
    options = BenchOptions(run=RunOptions(seed=0, steps=5), sizes=((64, 64),), frames=5, repeat=1)
    found = wanx.bench(compiled.root, output=tmp_path, options=options)
    assert found.complete
    assert found.settings.warm_up == 3
    assert found.subjects[0].target == "aoti"
    assert [len(stage.calls) for stage in found.trials[0].stages[:3]] == [2, 5, 2]
    (note,) = found.notes
    assert note.endswith("no roofline, since the GPU's limits are measured with PyTorch")
    assert note in (tmp_path / "report.md").read_text()


def test_every_network_at_every_step(compiled: Bundle, tmp_path: Path) -> None:
    """Teacher-forced: free-running videos diverge with the processor's rounding of bf16."""
    # Building measures which limit is faster, and that is different from run to run.
    compiled = changed(compiled, tmp_path / "b", max_batched_tokens=0)
    options = CompareOptions(run=RunOptions(prompt=PROMPT, seed=3, steps=6), clips=False)
    comparison = compare(compiled, on_cpu(compiled), options)
    (run,) = comparison.runs
    assert {part.component for part in run.parts} == {"text_encoder", "vae_decoder"}
    assert {name: len(steps) for name, steps in run.branches.items()} == {
        "conditional": 6,
        "unconditional": 6,
    }
    assert comparison.problems == []


def test_a_whole_video(compiled: Bundle) -> None:
    frames = Pipeline(compiled)(PROMPT, seed=3, steps=2).frames
    assert frames.shape == (17, 64, 64, 3)


def test_building_again_builds_nothing(
    compiled: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(compiled.root, copy)
    assert wanx.build(copy, target="cpu").manifest.target == "cpu"

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr("wanx.exporter.targets.aoti.AotiBuilder.build", fail)
    assert wanx.build(copy, target="aoti").manifest == compiled.manifest


def changed(compiled: Bundle, folder: Path, **update: object) -> Bundle:
    """A copy whose schedule of the denoiser says something else, signed anew and built here."""
    shutil.copytree(compiled.root, folder)
    engine = compiled.manifest.components["dit"].engines["aoti"]
    schedule = read_schedule(folder / engine).model_copy(update=update)
    (folder / engine).write_text(schedule.to_json())
    manifest = compiled.manifest.model_copy(update={"files": record_files(folder)})
    write_manifest(folder, manifest)
    mark_trusted(engine, manifest.files)
    return open_bundle(folder)


@pytest.mark.parametrize(
    ("update", "words"),
    [
        (
            {"compiler": "torch 2.0.0"},
            f"built by torch 2.0.0, and this is torch {HERE}",
        ),
        ({"device": "sm120"}, "built for sm120, and this machine"),
    ],
)
@pytest.mark.fault("engine of another machine")
def test_programs_of_another_machine(
    compiled: Bundle, tmp_path: Path, update: Mapping[str, Any], words: str
) -> None:
    bundle = changed(compiled, tmp_path / "b", **update)
    with pytest.raises(EnvironmentMismatchError, match=words) as caught:
        open_session(bundle, "dit")
    assert f"`wanx build {bundle.root} --target aoti`" in str(caught.value)


@pytest.mark.fault("engine from elsewhere")
def test_programs_from_elsewhere(
    compiled: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(EnvironmentMismatchError, match=r"compiled elsewhere.*WANX_TRUST_ENGINES=1"):
        open_session(compiled, "vae_decoder_first")
    monkeypatch.setenv("WANX_TRUST_ENGINES", "1")
    open_session(compiled, "vae_decoder_first").close()


def test_a_plan_that_wants_other_weights(compiled: Bundle, tmp_path: Path) -> None:
    schedule = read_schedule(compiled.root / compiled.manifest.components["dit"].engines["aoti"])
    steps = [s.model_copy(update={"prefix": s.prefix.replace("1", "9")}) for s in schedule.steps]
    bundle = changed(compiled, tmp_path / "b", steps=tuple(steps))
    with pytest.raises(CorruptInputError, match=r"lack 'blocks.9.* export it again"):
        open_session(bundle, "dit")


def test_without_pytorch(compiled: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanx.runtime.sessions.registry.find_spec", lambda _: None)
    with pytest.raises(EnvironmentMismatchError, match=r"pip install 'wanx\[export\]'"):
        open_session(compiled, "dit")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace('"embed.pt2"', '"../embed.pt2"'), "file"),
        (lambda text: text.replace('"tokens"', '"tokins"', 1), "reads tokens, which nothing makes"),
        (lambda text: text[:100], "not the schedule of an engine"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 2'), "schema_version"),
        (lambda text: text + " " * (8 << 20), "larger than"),
    ],
)
def test_a_plan_that_no_build_writes(
    compiled: Bundle, tmp_path: Path, change: Any, words: str
) -> None:
    path = compiled.root / compiled.manifest.components["dit"].engines["aoti"]
    schedule = EngineSchedule.model_validate_json(path.read_bytes())
    altered = tmp_path / SCHEDULE
    altered.write_text(change(schedule.to_json()))
    with pytest.raises(CorruptInputError, match=words):
        read_schedule(altered)
