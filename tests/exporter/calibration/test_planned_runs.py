"""Runs that calibrate: whatever a line of the file asks for, every step is computed alike."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from wanx.config.models import PRESETS
from wanx.exporter.calibration.options import CalibrationOptions, golden_only, planned_runs


def test_guidance_and_caches_of_lines(tmp_path: Path) -> None:
    line = {
        "prompt": "a red circle moving left on a white background", "cache": "easy",
        "guide_scale": "5@0-40%", "cfg_zero": True, "guidance_rescale": 0.5,
    }  # fmt: skip
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(line))
    ((run, _),) = planned_runs(CalibrationOptions(file=path, steps=9), PRESETS["tiny"])
    assert (run.cache, run.cfg_zero, run.guide_scale) == (None, None, 2.5)
    assert run.forwards == 18


def test_steps_of_a_distilled_model() -> None:
    config = PRESETS["tiny"]
    defaults = dataclasses.replace(config.defaults, preset="tiny-4step")
    config = dataclasses.replace(config, defaults=defaults)
    for options in (CalibrationOptions(steps=6), golden_only(CalibrationOptions(golden_steps=3))):
        for run, _ in planned_runs(options, config):
            assert (run.steps, run.solver, run.forwards) == (4, "euler", 4)
