"""A bundle of compiled programs against the same bundle on ONNX Runtime: every component of it."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import wanx
from wanx.benchmarks.accuracy.compare import CompareOptions, compare
from wanx.benchmarks.speed.suite import BenchOptions
from wanx.bundle.engine_schedule import read_schedule
from wanx.bundle.publish import record_files, write_manifest
from wanx.bundle.reader import Bundle, open_bundle
from wanx.bundle.trust import mark_trusted
from wanx.exporter.calibration.options import CalibrationOptions
from wanx.runtime.options import RunOptions
from wanx.runtime.pipeline import Pipeline
from wanx.runtime.sessions import open_session
from wanx.runtime.sessions.base import Session, State

PROMPT = "a red circle moving right on a blue background"
pytestmark = pytest.mark.slow


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


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def in_turn(compiled: Bundle, folder: Path) -> Bundle:
    """A copy that runs the branches of a step one after the other, signed anew and built here."""
    shutil.copytree(compiled.root, folder)
    engine = compiled.manifest.components["dit"].engines["aoti"]
    schedule = read_schedule(folder / engine).model_copy(update={"max_batched_tokens": 0})
    (folder / engine).write_text(schedule.to_json())
    manifest = compiled.manifest.model_copy(update={"files": record_files(folder)})
    write_manifest(folder, manifest)
    mark_trusted(engine, manifest.files)
    return open_bundle(folder)


def test_it_is_what_the_export_says(compiled: Bundle) -> None:
    assert compiled.manifest.target == "aoti"
    for name, component in compiled.manifest.components.items():
        schedule = read_schedule(compiled.root / component.engines["aoti"])
        assert schedule.device == ("cpu" if not torch.cuda.is_available() else schedule.device)
        assert isinstance(open_session(on_cpu(compiled), name), Session)


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
    compiled = in_turn(compiled, tmp_path / "b")
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
