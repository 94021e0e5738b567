"""Commands on parts from different places, and on LoRAs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support.command_line import Wanx
from tools.repackage import tensors_of, write_dit, write_others
from wanx.bundle.reader import open_bundle
from wanx.exporter.source import open_source


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    checkpoint = open_source("tiny")
    tensors = tensors_of(checkpoint.components["dit"])
    write_dit(tensors, folder / "diffusion_models", "tiny", "fp8_scaled_prefix")
    list(write_others(checkpoint, folder))
    rows, columns = tensors["blocks.0.ffn.0.weight"].shape
    layer = "diffusion_model.blocks.0.ffn.0"
    save_file(
        {f"{layer}.lora_up.weight": torch.ones(rows, 1) * 1e-3,
         f"{layer}.lora_down.weight": torch.ones(1, columns),
         "diffusion_model.blocks.0.cross_attn.k_img.diff_b": torch.ones(rows)},
        folder / "lora.safetensors",
    )  # fmt: skip
    return folder


def test_an_export_from_comfyui(wanx: Wanx, models: Path, tmp_path: Path) -> None:
    tokenizer = str(open_source("tiny").tokenizer.path)
    arguments = ["export", "--comfyui", str(models), "--dit", "tiny", "--tokenizer", tokenizer]
    arguments += ["--lora", f"{models / 'lora.safetensors'}:0.5", "--golden-steps", "0"]
    planned = wanx(*arguments, "--dry-run")
    assert planned.code == 0
    assert "tiny (t2v, ComfyUI layout) at bf16" in planned.out
    assert not list(tmp_path.iterdir())
    result = wanx(*arguments, "-o", "bundle")
    assert result.code == 0
    assert "with lora.safetensors (" in result.out
    assert "at 0.5: 2 tensors, 1 fit nothing" in result.out
    assert (
        "1 of 3 tensors fit nothing in this model and are left out: diffusion_model." in result.err
    )
    (record,) = open_bundle(tmp_path / "bundle").manifest.provenance.loras
    assert (record.strength, record.matched) == (0.5, 2)


def test_a_bundle_with_another_lora(wanx: Wanx, models: Path, tmp_path: Path) -> None:
    lora = str(models / "lora.safetensors")
    result = wanx("build", "tiny", "--lora", lora, "-o", "styled", "--json")
    assert result.code == 0
    assert json.loads(result.out)["hash"] == open_bundle(tmp_path / "styled").hash
    assert wanx("verify", "styled").code == 0
    assert "with lora.safetensors (" in wanx("inspect", "styled").out


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["export", "--lora", "no.safetensors"], 5, "no.safetensors"),
        (["export", "--lora", "lora.safetensors:x"], 2, "'x' is no strength"),
        (["export", "--dit", "no.gguf"], 5, "no.gguf"),
        (["export", "--comfyui", "no", "--dit", "x"], 2, "--comfyui no is no folder"),
        (["export", "--dit", "lora.safetensors"], 2, "holds no network of Wan2.1"),
        (["export", "--vae", "lora.safetensors"], 2, "what was given has no transformer"),
        (["build", "tiny", "--lora", "x"], 2, "--lora makes a new bundle"),
        (["build", "tiny", "-o", "x"], 2, "--lora makes a new bundle"),
        (
            ["build", "tiny", "--lora", "x", "-o", "y", "--opt-level", "3", "--sizes", "32x32"],
            2,
            "--sizes, --opt-level does not go with --lora",
        ),
    ],
)
def test_what_is_refused(
    wanx: Wanx, arguments: list[str], code: int, text: str, models: Path, tmp_path: Path
) -> None:
    (tmp_path / "lora.safetensors").write_bytes((models / "lora.safetensors").read_bytes())
    result = wanx(*arguments)
    assert result.code == code
    assert text in result.err
    assert len(result.err.strip().splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"lora.safetensors"}
