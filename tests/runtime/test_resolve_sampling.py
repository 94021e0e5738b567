"""Presets, lists of noise levels and guidance, resolved and refused."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest

from wanx.config.models import PRESETS
from wanx.config.presets import RUN_PRESETS, suggest_preset
from wanx.errors import UsageError
from wanx.runtime.inputs.reading import Inputs
from wanx.runtime.options import ResolvedRun, RunOptions
from wanx.runtime.resolve import resolve
from wanx.runtime.sampling.solvers import make_sampler

T2V, I2V = PRESETS["t2v-14B"], PRESETS["i2v-14B"]


def resolved(config: Any = T2V, **options: Any) -> ResolvedRun:
    return resolve(RunOptions(prompt="a cat", seed=0, **options), config, Inputs())


def timesteps(run: ResolvedRun) -> list[float]:
    import numpy as np

    sigmas = None if run.sigmas is None else np.append(run.sigmas, 0.0)
    sampler = make_sampler(run.solver, run.steps, run.shift, sigmas, timesteps=run.timesteps)
    return [round(float(step), 2) for step in sampler.timesteps]


@pytest.mark.parametrize(
    ("preset", "solver", "expected"),
    [
        ("lightx2v-4step", "euler", [1000, 937.5, 833.33, 625]),
        ("lightx2v-8step", "euler", [1000, 972.22, 937.5, 892.86, 833.33, 750, 625, 416.67]),
        ("causvid", "euler", [999, 934, 862, 756, 603, 410, 250, 140, 74]),
        ("causvid-4step", "lcm", [1000, 750, 500, 250]),
        ("fastwan", "lcm", [1000, 757, 522]),
        ("rcm-4", "rcm", [987.65, 933.78, 852.9, 608.98]),
        ("rcm-1", "rcm", [987.65]),
    ],
)
def test_presets(preset: str, solver: str, expected: list[float]) -> None:
    run = resolved(preset=preset)
    assert (run.preset, run.solver, run.steps, run.guide_scale) == (
        preset, solver, len(expected), 1.0
    )  # fmt: skip
    assert timesteps(run) == expected
    assert run.guidance.branches == ("conditional",)


def test_levels_of_fastwan_are_those_of_its_table() -> None:
    sigmas = resolved(preset="fastwan").sigmas
    assert sigmas is not None
    # Of 1000 levels with shift 8 the nearest to 0.757 and 0.522.
    table = [8 * u / (1 + 7 * u) for u in (i / 1000 for i in range(1, 1001))]
    assert all(sigma in table for sigma in sigmas)
    assert sigmas == pytest.approx((1.0, 0.757, 0.522), abs=2e-3)


def test_rcm_from_an_image_begins_higher() -> None:
    assert timesteps(resolved(I2V, preset="rcm-2")) == [995.02, 933.78]


def test_steps_of_presets_without_a_list() -> None:
    assert resolved(preset="accvid").steps == 10
    assert resolved(preset="accvid", steps=6).steps == 6
    assert resolved(preset="fusionx").shift == 2.0


def test_every_preset_resolves_for_its_tasks() -> None:
    for preset in RUN_PRESETS.values():
        config = T2V if "t2v" in preset.tasks else I2V
        assert resolved(config, preset=preset.name).steps == preset.count


def test_a_bundle_has_a_preset_of_its_own() -> None:
    defaults = dataclasses.replace(T2V.defaults, preset="lightx2v-4step")
    config = dataclasses.replace(T2V, defaults=defaults)
    assert resolved(config).steps == 4
    assert resolved(config, preset="none").steps == T2V.defaults.steps
    assert resolved(config, preset="rcm-2").solver == "rcm"


def test_own_lists() -> None:
    assert timesteps(resolved(timesteps="1000,750,500,250", solver="euler")) == [
        1000,
        750,
        500,
        250,
    ]
    run = resolved(timesteps="1000,500", warp=True, shift=3.0, solver="lcm")
    assert timesteps(run) == [1000, 750]
    assert resolved(sigmas=(0.9, 0.4)).sigmas == (0.9, 0.4)
    assert timesteps(resolved(sigmas=(0.9999, 0.4))) == [999, 400]  # UniPC's are whole numbers
    assert resolved(preset="lightx2v-4step", sigmas=(1, 0.5)).steps == 2


def test_guidance_of_distilled_models_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert resolved(preset="lightx2v-4step", guide_scale=5.0).guide_scale == 5.0
    assert "blur with guidance" in caplog.text


@pytest.mark.parametrize(("frames", "task", "steps", "zero"), [(81, T2V, 50, 2), (81, T2V, 20, 1)])
def test_steps_of_zero(frames: int, task: Any, steps: int, zero: int) -> None:
    run = resolved(task, cfg_zero=True, steps=steps, frames=frames)
    assert run.cfg_zero == zero
    assert run.guidance.branches_at(zero - 1) == ()
    assert len(run.guidance.branches_at(zero)) == 2
    assert run.forwards == 2 * (steps - zero)


def test_steps_of_zero_with_an_image() -> None:
    assert resolved(I2V, cfg_zero=True, steps=40).cfg_zero == 1


@pytest.mark.fault("steps and guidance that cannot be")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "lightx2v-4steps"}, "did you mean lightx2v-4step"),
        ({"preset": "zzz"}, "there is no preset 'zzz'; choose"),
        ({"preset": "lightx2v-4step", "steps": 8}, "preset lightx2v-4step takes 4"),
        ({"timesteps": "1000,500", "steps": 4}, "the list has 2; leave --steps out"),
        ({"timesteps": "500,1000"}, "timesteps has 1000 behind 500; give numbers that fall"),
        ({"timesteps": "500,500"}, "timesteps has 500 behind 500"),
        ({"timesteps": "1001,5"}, "timesteps has 1001; give numbers above 0 and up to 1000"),
        ({"timesteps": "5,0"}, "timesteps has 0; give numbers above 0"),
        ({"sigmas": "1.5,0.5"}, "sigmas has 1.5; give numbers above 0 and up to 1"),
        ({"timesteps": "nan"}, "timesteps has nan"),
        ({"timesteps": "5", "sigmas": "0.5"}, "--timesteps and --sigmas do not go together"),
        ({"warp": True}, "--warp is for the list of --timesteps"),
        ({"timesteps": "5", "shift": 3.0}, "add --warp to --timesteps"),
        ({"solver": "rcm", "steps": 9}, "solver rcm takes 1 to 4"),
        ({"guide_scale": "5@0-40%,3@30-100%"}, "overlap at 30%"),
        ({"guide_scale": "5@40-0%"}, "give a number such as 5"),
        ({"guide_scale": "5@0-40"}, "give a number such as 5"),
        ({"guide_scale": "much"}, "give a number such as 5"),
        ({"cfg_zero": True, "apg": True}, "--cfg-zero and --apg do not go together"),
        ({"cfg_zero": True, "guide_scale": 1}, "--cfg-zero needs guidance"),
        ({"apg": True, "preset": "causvid"}, "--apg needs guidance"),
        ({"guidance_rescale": 1.5}, "guidance rescale is 1.5; choose 0 to 1"),
        ({"cfg_zero": True, "steps": 1}, "--cfg-zero needs 2 steps or more"),
        ({"cache": "2x", "steps": 2}, "--cache is for 4 steps or more, not 2"),
        ({"cache": "easy", "steps": 8}, "--cache is for 9 steps or more, not 8"),
        ({"speedup": 0.5}, "speedup is 0.5; give 1 or more"),
        ({"speedup": 2, "cache": "2x"}, "--cache and --speedup do not go together"),
        ({"cache": "fast"}, "cache is 'fast'; give off, easy"),
        ({"cache": "easy:0"}, "give EasyCache a threshold"),
        ({"speedup": 2, "preset": "lightx2v-8step"}, "--speedup does not go with preset"),
        ({"speedup": 2, "solver": "lcm"}, "--speedup does not go with solver lcm"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolved(**options)


@pytest.mark.fault("steps and guidance that cannot be")
def test_a_preset_for_another_task() -> None:
    with pytest.raises(UsageError, match="preset fastwan is for t2v, and this is a model for i2v"):
        resolved(I2V, preset="fastwan")


@pytest.mark.parametrize(
    ("name", "task", "preset"),
    [
        (
            "Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32.safetensors",
            "t2v",
            "lightx2v-4step",
        ),
        ("Wan2.2-Lightning_I2V-A14B-4steps-lora.safetensors", "i2v", "lightx2v-4step"),
        ("Wan21_CausVid_14B_T2V_lora_rank32.safetensors", "t2v", "causvid"),
        ("Wan21_AccVid_T2V_14B_lora_rank32_fp16.safetensors", "t2v", "accvid"),
        ("Wan14BT2VFusioniX_fp16_.safetensors", "t2v", "fusionx"),
        ("Wan2.1_T2V_14B_FusionX_LoRA.safetensors", "t2v", "fusionx"),
        ("FastWan2.1-T2V-1.3B-Diffusers", "t2v", "fastwan"),
        ("FastWan2.1-T2V-1.3B-Diffusers", "i2v", None),
        ("rCM_Wan2.1_T2V_1.3B_480p.pt", "t2v", "rcm-4"),
        ("growing.safetensors", "t2v", None),
        ("wan2.1_t2v_14B_bf16.safetensors", "t2v", None),
    ],
)
def test_names_of_distilled_models(name: str, task: Any, preset: str | None) -> None:
    found = suggest_preset(["other.safetensors", name], task)
    assert (None if found is None else (found[0], found[1].name)) == (preset and (name, preset))
