"""The LoRA that distils the built-in model: four steps without guidance draw what 40 forwards did.

It goes through LoRA fusion, presets and both solvers of few steps.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from data import Scene, split_scenes
from detector import detect

import wanx
from tests.support.command_line import Wanx
from tests.support.paths import ROOT
from wanx.exporter.calibration.options import CalibrationOptions
from wanx.runtime.pipeline import Pipeline

LORA = ROOT / "tools" / "tiny" / "four_steps.safetensors"
QUICK = CalibrationOptions(prompts=4, steps=4, golden_steps=2)
REQUIRED = {"colour": 95, "background": 95, "direction": 95, "shape": 85}
SCENES = split_scenes()[1]


def require_scenes(pipeline: Pipeline, scenes: Sequence[Scene], solver: str | None = None) -> None:
    found = []
    for number, scene in enumerate(scenes):
        result = pipeline(scene.caption, seed=3000 + number, solver=solver)
        assert result.frames is not None
        assert (result.options.steps, result.forwards) == (4, 4)
        found.append(detect(result.frames).scene)
    share = {
        field: 100
        * np.mean(
            [getattr(w, field) == getattr(s, field) for w, s in zip(scenes, found, strict=True)]
        )
        for field in REQUIRED
    }
    assert all(share[field] >= least for field, least in REQUIRED.items()), share


@pytest.mark.parametrize(
    "precision",
    ["fp32", "int8", pytest.param("fp8", marks=pytest.mark.slow)],
)
def test_four_steps(precision: str, tmp_path: Path) -> None:
    assert LORA.stat().st_size < 1_000_000
    bundle = wanx.export(
        "tiny", tmp_path / "bundle", loras=[LORA], precision=precision, preset="tiny-4step",
        calibration=QUICK,
    )  # fmt: skip
    assert bundle.manifest.defaults.preset == "tiny-4step"
    pipeline = wanx.load(bundle.root, threads=2)
    require_scenes(pipeline, SCENES)
    require_scenes(pipeline, SCENES, solver="lcm")


def test_the_command_line(wanx: Wanx, tmp_path: Path) -> None:
    arguments = ("export", "tiny", "--lora", str(LORA), "--golden-steps", "0")
    code, out, _ = wanx(*arguments, "--preset", "tiny-4step", "-o", "four")
    assert code == 0
    assert "preset tiny-4step" in out
    code, out, err = wanx("run", "four", "a red circle moving up on a black background")
    assert code == 0
    assert "denoise: 0 of 4" in err
    refused = wanx(*arguments, "--preset", "tiny-4steps", "-o", "five")
    assert refused.code == 2
    assert "did you mean tiny-4step" in refused.error
    assert not (tmp_path / "five").exists()


def test_a_name_that_tells(wanx: Wanx, tmp_path: Path) -> None:
    """Without a preset, export and run suggest it in one line."""
    shutil.copy(LORA, tmp_path / "tiny-4step.safetensors")
    exported = wanx(
        "export", "tiny", "--lora", "tiny-4step.safetensors", "--golden-steps", "0", "-o", "plain"
    )
    assert exported.code == 0
    assert (
        "tiny-4step.safetensors looks distilled to few steps: --preset tiny-4step" in exported.err
    )
    prompt = "a red circle moving up on a black background"
    assert "try --preset tiny-4step" in wanx("run", "plain", prompt, "--frames", "5").err
    chosen = wanx("run", "plain", prompt, "--frames", "5", "--preset", "tiny-4step")
    assert chosen.code == 0
    assert "looks distilled" not in chosen.err
