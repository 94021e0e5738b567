"""The built-in model from every format that people share draws what the prompt says."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from detector import detect
from safetensors.torch import save_file

import wanx
from tools.repackage import GGUF, SAFETENSORS, tensors_of, write_dit, write_others
from wanx.accuracy.golden_check import check_golden
from wanx.builtin import builtin_bundle
from wanx.bundle.golden_steps import GOLDEN
from wanx.bundle.reader import Bundle
from wanx.checkpoints.checkpoint import PartPaths
from wanx.checkpoints.layouts.files import open_parts
from wanx.errors import UsageError
from wanx.exporter.calibration.options import CalibrationOptions
from wanx.exporter.source import open_source

PROMPT = "a red circle moving right on a blue background"
NO_GOLDEN = CalibrationOptions(golden_steps=0)
QUICK = CalibrationOptions(prompts=1, steps=2, golden_steps=1, width=32, height=32, frames=5)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI's folder with the built-in model in all forms."""
    folder = tmp_path_factory.mktemp("models")
    checkpoint = open_source("tiny")
    tensors = tensors_of(checkpoint.components["dit"])
    for form in (*SAFETENSORS, *GGUF):
        write_dit(tensors, folder / "diffusion_models", f"tiny-{form}", form)
    assert len(list(write_others(checkpoint, folder))) == 2
    return folder


def export(models: Path, form: str, output: Path, **options: object) -> Bundle:
    return wanx.export(
        None,
        output,
        parts=PartPaths(
            comfyui=models, dit=Path(f"tiny-{form}"), tokenizer=open_source("tiny").tokenizer.path
        ),
        **({"calibration": NO_GOLDEN} | options),  # type: ignore[arg-type]
    )


def draws_the_prompt(bundle: Bundle) -> None:
    frames = wanx.load(bundle.root)(PROMPT, seed=0).frames
    assert frames is not None
    assert detect(frames).scene.caption == PROMPT


@pytest.mark.parametrize("form", [*SAFETENSORS, *GGUF])
def test_it_draws_what_the_prompt_says(form: str, models: Path, tmp_path: Path) -> None:
    bundle = export(models, form, tmp_path / "bundle")
    assert bundle.manifest.name == "tiny"
    assert bundle.manifest.provenance.source_layout == "ComfyUI"
    # 8-bit linears have become bf16; what was in full precision keeps it.
    quantized = form.startswith("fp8") or form in GGUF
    storage = bundle.manifest.components["dit"].storage
    assert ("BF16" in storage) == quantized
    assert "F8_E4M3" not in storage
    draws_the_prompt(bundle)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_an_8_bit_source_in_8_bits(precision: str, models: Path, tmp_path: Path) -> None:
    bundle = export(models, "fp8_scaled", tmp_path / "b", precision=precision, calibration=QUICK)
    for agreement in check_golden(bundle, threads=1):
        assert agreement.cosine >= 0.98
    draws_the_prompt(bundle)


def test_formats_compose(models: Path, tmp_path: Path) -> None:
    """A GGUF transformer, an 8-bit text encoder, two LoRAs, through links."""
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "dit.gguf").symlink_to(models / "diffusion_models" / "tiny-Q8_0.gguf")
    encoder = tensors_of(
        open_parts(models / "text_encoders" / "umt5.safetensors")["text_encoder"].weights
    )
    low = {
        name: tensor.to(torch.float8_e5m2) if tensor.ndim == 2 and "blocks" in name else tensor
        for name, tensor in encoder.items()
    }
    save_file(low, tmp_path / "umt5.safetensors")
    (hub / "umt5.safetensors").symlink_to(tmp_path / "umt5.safetensors")
    base = open_parts(hub / "dit.gguf")["dit"].weights
    (height, width) = base.tensors["blocks.0.ffn.0.weight"].shape
    for number in range(2):
        draw = torch.Generator().manual_seed(number)
        layer = "diffusion_model.blocks.0.ffn.0"
        tensors = {f"{layer}.lora_up.weight": torch.randn(height, 2, generator=draw)}
        tensors[f"{layer}.lora_down.weight"] = torch.randn(2, width, generator=draw)
        tensors["diffusion_model.blocks.9.ffn.0.diff_b"] = torch.zeros(height)
        save_file(tensors, hub / f"{number}.safetensors")
    bundle = wanx.export(
        None, tmp_path / "bundle", precision="fp32", calibration=NO_GOLDEN,
        parts=PartPaths(
            dit=hub / "dit.gguf", text_encoder=hub / "umt5.safetensors",
            vae=models / "vae" / "wan_2.1_vae.safetensors",
            tokenizer=open_source("tiny").tokenizer.path,
        ),
        loras=[f"{hub / '0.safetensors'}:0.01", f"{hub / '1.safetensors'}:-0.02"],
    )  # fmt: skip
    records = bundle.manifest.provenance.loras
    assert [(r.file, r.strength, r.matched) for r in records] == [
        ("0.safetensors", 0.01, 2), ("1.safetensors", -0.02, 2),
    ]  # fmt: skip
    assert records[0].unmatched == ("diffusion_model.blocks.9.ffn.0.diff_b",)
    (weights,) = (bundle.root / path for path in bundle.manifest.components["dit"].weights)
    found = tensors_of(open_parts(weights)["dit"].weights)["blocks.0.ffn.0.weight"]
    pieces = base.tensors["blocks.0.ffn.0.weight"].iter_converted("F32")
    expected = np.frombuffer(b"".join(bytes(piece) for piece in pieces), "<f4").astype(np.float64)
    for number, strength in enumerate((0.01, -0.02)):
        draw = torch.Generator().manual_seed(number)
        up = torch.randn(height, 2, generator=draw).double()
        down = torch.randn(2, width, generator=draw).double()
        expected = expected + strength * (up @ down).numpy().reshape(-1)
    np.testing.assert_allclose(found.numpy().reshape(-1), expected, rtol=1e-7, atol=1e-9)


def test_a_bundle_takes_further_loras(tmp_path: Path) -> None:
    """Into a new bundle, if its weights are not quantised; its golden steps are its own."""
    (height, width) = open_source("tiny").components["dit"].tensors["blocks.0.ffn.0.weight"].shape
    layer = "lora_unet_blocks_0_ffn_0"
    save_file(
        {f"{layer}.lora_up.weight": torch.ones(height, 1),
         f"{layer}.lora_down.weight": torch.ones(1, width)},
        tmp_path / "lora.safetensors",
    )  # fmt: skip
    made = wanx.export("tiny", tmp_path / "new", loras=[str(tmp_path / "lora.safetensors")])
    assert made.manifest.provenance.loras[0].matched == 2
    for agreement in check_golden(made, threads=1):
        assert agreement.cosine >= 0.9999
    shutil.copy(builtin_bundle() / GOLDEN, made.root / GOLDEN)  # of the model without it
    assert min(one.cosine for one in check_golden(made, threads=1)) < 0.999
    shutil.rmtree(made.root)
    made = wanx.export("tiny", tmp_path / "new", loras=[str(tmp_path / "lora.safetensors")])
    again = wanx.export(
        made.root, tmp_path / "again", loras=[f"{tmp_path / 'lora.safetensors'}:-1"]
    )
    assert [record.strength for record in again.manifest.provenance.loras] == [1, -1]
    for agreement in check_golden(again, threads=1):
        assert agreement.cosine >= 0.9999
    with pytest.raises(UsageError, match=r"is a bundle, whose parts stay"):
        wanx.export("tiny", tmp_path / "x", parts=PartPaths(vae=tmp_path / "vae.safetensors"))
    int8 = wanx.export("tiny", tmp_path / "int8", precision="int8", calibration=QUICK)
    with pytest.raises(UsageError, match=r"quantised to int8; export from .* --precision int8"):
        wanx.export(int8.root, tmp_path / "x", loras=[str(tmp_path / "lora.safetensors")])
