"""A bundle of compiled programs against the same bundle on ONNX Runtime: every component of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import wanx
from tests.support.engines import on_cpu, relative, rescheduled, text_and_frames
from wanx.benchmarks.accuracy.compare import CompareOptions, compare
from wanx.benchmarks.speed.suite import BenchOptions
from wanx.bundle.engine_schedule import read_schedule
from wanx.bundle.reader import Bundle
from wanx.exporter.calibration.options import CalibrationOptions
from wanx.runtime.options import RunOptions
from wanx.runtime.pipeline import Pipeline
from wanx.runtime.sessions import open_session
from wanx.runtime.sessions.base import Session

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


def test_it_is_what_the_export_says(compiled: Bundle) -> None:
    assert compiled.manifest.target == "aoti"
    for name, component in compiled.manifest.components.items():
        schedule = read_schedule(compiled.root / component.engines["aoti"])
        assert schedule.device == ("cpu" if not torch.cuda.is_available() else schedule.device)
        assert isinstance(open_session(on_cpu(compiled), name), Session)


def test_text_and_carried_state(compiled: Bundle) -> None:
    answers = (text_and_frames(bundle) for bundle in (compiled, on_cpu(compiled)))
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
    compiled = rescheduled(compiled, tmp_path / "b", max_batched_tokens=0)
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
