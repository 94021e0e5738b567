"""Step caches of runs on bundles: measured tables, published coefficients, EasyCache."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import wanx
from tests.support.command_line import Wanx
from wanx.builtin import builtin_bundle, open_named
from wanx.bundle.reader import Bundle, open_bundle
from wanx.bundle.step_table import STEP_TABLE
from wanx.config.models import PRESETS
from wanx.errors import CorruptInputError, UsageError
from wanx.exporter.calibration.options import CalibrationOptions
from wanx.exporter.calibration.step_table import measure_step_table
from wanx.models.dit.embeddings import TimeEmbedding
from wanx.runtime.inputs.reading import Inputs
from wanx.runtime.options import ResolvedRun, RunOptions
from wanx.runtime.resolve import resolve
from wanx.runtime.step_cache import plan_cache, step_table
from wanx.runtime.time_embedding import embed_timesteps

PROMPT = "a red circle moving right on a blue background"


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in bundle with a table."""
    folder = tmp_path_factory.mktemp("measured") / "tiny"
    shutil.copytree(builtin_bundle("tiny"), folder)
    wanx.build(folder, target=None, calibrate_cache=CalibrationOptions(prompts=2))
    return folder


def resolved(bundle: Bundle, **options: Any) -> ResolvedRun:
    return resolve(RunOptions(prompt=PROMPT, seed=0, **options), bundle.manifest.config, Inputs())


def test_a_table_of_the_bundle(measured: Path) -> None:
    bundle = open_bundle(measured)  # every file is hashed
    table = step_table(bundle)
    assert table is not None
    assert (len(table.sigmas), table.samples) == (20, 2)
    assert bundle.manifest.target == "cpu"
    verified = wanx.verify(measured)
    assert verified.intact
    verified.require_accuracy()
    # Velocities change little from step to step, and errors of the first steps grow.
    costs = table.costs(table.sigmas.tolist(), [2.5] * 20)
    assert 0 < costs.error(11, 10, 9) < 0.01 < costs.error(11, 5, 4)
    assert table.growth[1] > 2 * table.growth[10]


@pytest.mark.parametrize(("speedup", "forwards"), [(1.5, 26), (2, 20), (2.5, 16), (4, 10)])
def test_the_saving_that_was_asked_for(measured: Path, speedup: float, forwards: int) -> None:
    bundle = open_named(str(measured), verify="size")
    plan = plan_cache(bundle, resolved(bundle, speedup=speedup))
    assert plan is not None
    assert (plan.source, plan.forwards, plan.all_forwards) == ("table", forwards, 40)
    assert plan.error is not None
    again = plan_cache(bundle, resolved(bundle, cache=f"{speedup}x"))
    assert again is not None
    assert again.computed == plan.computed


def test_more_is_saved_at_a_price(measured: Path) -> None:
    bundle = open_named(str(measured), verify="size")
    plans = [plan_cache(bundle, resolved(bundle, speedup=s)) for s in (1.25, 1.5, 2, 3, 5)]
    errors = [plan.error for plan in plans if plan is not None and plan.error is not None]
    assert len(errors) == 5
    assert errors == sorted(errors)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 30}, {"steps": 9, "solver": "dpm++"}, {"shift": 8.0}, {"solver": "euler"},
        {"guide_scale": 1.0}, {"guide_scale": "5@0-40%"}, {"cfg_zero": True},
        {"guide_scale": "1@0-40%,5@40-100%"}, {"guide_scale": "5@0-20%,5@60-100%"},
        {"guidance_rescale": 0.5, "apg": True}, {"sigmas": (1.0, 0.9, 0.7, 0.4, 0.2, 0.1)},
    ],
)  # fmt: skip
def test_other_runs_than_the_measured(measured: Path, options: dict[str, Any]) -> None:
    """Their forwards are what was said, and the video is near that of all forwards."""
    pipeline = wanx.load(measured)
    full = pipeline(PROMPT, seed=1, frames=5, **options)
    saved = pipeline(PROMPT, seed=1, frames=5, speedup=1.5, **options)
    assert saved.cache is not None
    assert full.forwards == saved.cache.all_forwards
    assert saved.forwards == saved.cache.forwards <= full.forwards / 1.5
    zero = full.options.cfg_zero or 0
    assert len(saved.predicted) == full.options.steps - zero - len(saved.cache.computed or ())
    assert full.frames is not None
    assert saved.frames is not None
    difference = np.abs(full.frames.astype(float) - saved.frames.astype(float)).mean()
    assert difference < 12


def test_the_speed(measured: Path) -> None:
    pipeline = wanx.load(measured)
    full, saved = pipeline(PROMPT, seed=1), pipeline(PROMPT, seed=1, speedup=2)
    seconds = [
        next(stage.seconds for stage in result.stages if stage.name == "denoise")
        for result in (full, saved)
    ]
    assert seconds[0] > 1.3 * seconds[1]  # 1.9 to 2.1 where nothing else runs


@pytest.mark.parametrize("guide_scale", ["1@0-50%,5@50-100%", "5@0-20%,5@60-100%", 2.5])
def test_easy_cache_with_branches_that_come_and_go(guide_scale: Any) -> None:
    result = wanx.load("tiny")(PROMPT, seed=0, frames=5, cache="easy:2", guide_scale=guide_scale)
    assert result.predicted
    assert result.forwards < result.options.forwards
    assert not set(result.predicted) & {step + 1 for step in result.options.guidance.required_steps}


@pytest.mark.fault("a saving that cannot be")
def test_too_much(measured: Path) -> None:
    bundle = open_named(str(measured), verify="size")
    with pytest.raises(UsageError, match=r"speedup is 30; this run allows 6.67 at most"):
        plan_cache(bundle, resolved(bundle, speedup=30))


@pytest.mark.fault("a saving that cannot be")
def test_no_table(tmp_path: Path) -> None:
    bundle = open_named("tiny-i2v", verify="size")
    run = replace(resolved(open_named("tiny", verify="size"), speedup=2))
    with pytest.raises(UsageError, match="`wanx export tiny-i2v -o NEW --calibrate-cache`"):
        plan_cache(bundle, run)


def test_lines_with_noise_levels_of_their_own(measured: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": PROMPT}, {"prompt": PROMPT, "solver": "euler"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    bundle = open_named(str(measured), verify="size")
    with pytest.raises(UsageError, match="different noise levels; leave out solver"):
        measure_step_table(bundle, CalibrationOptions(file=path))


def test_published_coefficients_without_a_table() -> None:
    bundle = open_named("tiny-i2v", verify="size")
    config = replace(bundle.manifest.config, name="t2v-1.3B")
    bundle = replace(bundle, manifest=bundle.manifest.model_copy(update={"config": config}))
    run = resolved(open_named("tiny", verify="size"), speedup=2)
    plan = plan_cache(bundle, run)
    assert plan is not None
    assert (plan.source, plan.error) == ("teacache", None)
    assert plan.forwards is not None
    assert plan.forwards <= 20
    assert "their error is not known" in plan.summary


@pytest.mark.fault("a table of a step cache that is not one")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": np.zeros((3, 2, 2))}, "do not fit together"),
        ({"sigmas": np.ones(20)}, "do not fit together"),
        ({"growth": np.full(20, np.nan)}, "not finite"),
        ({"growth": np.zeros(20)}, "do not fit together"),
        ({"velocity": np.zeros((3, 20), np.float32)}, "velocity is F32"),
        ({"sigmas": None}, "sigmas"),
    ],
)
def test_damaged_tables(
    change: dict[str, Any], message: str, measured: Path, tmp_path: Path
) -> None:
    bundle = altered_table(measured, tmp_path, change)
    with pytest.raises(CorruptInputError, match=message):
        step_table(bundle)


@pytest.mark.fault("a table of a step cache that is not one")
def test_a_table_of_another_bundle(measured: Path, tmp_path: Path) -> None:
    bundle = altered_table(measured, tmp_path, {}, weights="0" * 64)
    with pytest.raises(CorruptInputError, match="measured on the weights of another bundle"):
        step_table(bundle)


def altered_table(
    measured: Path, tmp_path: Path, change: dict[str, Any], weights: str | None = None
) -> Bundle:
    folder = tmp_path / "altered"
    shutil.copytree(measured, folder)
    path = folder / STEP_TABLE
    arrays = {**load_file(path), **change}
    from wanx.bundle.step_table import weights_digest

    bundle = open_named(str(measured), verify="size")
    metadata = {"samples": "2", "weights": weights or weights_digest(bundle.manifest)}
    save_file({k: v for k, v in arrays.items() if v is not None}, path, metadata)
    return replace(open_bundle(measured, verify="size"), root=folder, directory=None)


@pytest.mark.parametrize("name", ["tiny", "tiny-i2v"])
def test_embedded_timesteps(name: str) -> None:
    """Against the module of the network, with fp32 weights and 16-bit ones."""
    bundle = open_named(name, verify="size")
    config = PRESETS[name].dit
    module = TimeEmbedding(config.freq_dim, config.dim)
    from safetensors.torch import load_file as load_torch

    weights = load_torch(bundle.held(bundle.manifest.components["dit"].weights[0]))
    prefix = "time_embedding."
    module.load_state_dict(
        {k.removeprefix(prefix): v.float() for k, v in weights.items() if k.startswith(prefix)}
    )
    timesteps = [999.0, 937.5, 500.0, 92.0, 1.0]
    expected = module(torch.tensor(timesteps)).detach().numpy()
    np.testing.assert_allclose(embed_timesteps(bundle, timesteps), expected, atol=2e-5, rtol=1e-4)


def test_the_command_line(measured: Path, wanx: Wanx, tmp_path: Path) -> None:
    arguments = ("run", str(measured), PROMPT, "--seed", "0", "--frames", "5")
    code, out, _ = wanx(*arguments, "--speedup", "2", "-o", str(tmp_path / "a.mp4"), "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["forwards"] == 20
    assert len(facts["predicted_steps"]) == 10
    assert facts["cache"]["source"] == "table"
    assert facts["cache"]["forwards_without"] == 40
    assert 0 < facts["cache"]["predicted_error"] < 0.2
    shown = wanx(*arguments, "--cache", "1.5x", "--dry-run")
    assert "26 of 40 forwards run, 1.54 times fewer" in shown.out
    told = wanx(*arguments, "--cache", "easy", "-o", str(tmp_path / "b.mp4"))
    assert "EasyCache with a threshold of 0.05 decides" in told.err


def test_the_metadata_of_the_video(measured: Path, tmp_path: Path) -> None:
    import av

    result = wanx.load(measured).run(
        RunOptions(prompt=PROMPT, seed=0, frames=5, speedup=2), output=tmp_path / "a.mp4"
    )
    with av.open(str(tmp_path / "a.mp4")) as video:
        text = json.dumps(dict(video.metadata))
    assert "20 of 40" in text
    assert ",".join(map(str, result.predicted)) in text


@pytest.mark.fault("a saving that cannot be")
def test_a_distilled_bundle_has_nothing_to_skip(measured: Path) -> None:
    bundle = open_named(str(measured), verify="size")
    config = bundle.manifest.config
    defaults = replace(config.defaults, preset="tiny-4step")
    manifest = bundle.manifest.model_copy(update={"config": replace(config, defaults=defaults)})

    with pytest.raises(UsageError, match="runs by preset tiny-4step"):
        measure_step_table(replace(bundle, manifest=manifest), CalibrationOptions(prompts=1))
