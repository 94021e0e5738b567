"""What tools/synthesize.py writes is a checkpoint that can be exported, for every task."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.paths import TOOLS
from wanx.config.models import PRESETS, ImageEncoderConfig, ModelConfig
from wanx.exporter.export import plan
from wanx.exporter.options import ExportOptions

CLIP = ImageEncoderConfig(dim=48, ffn_dim=60, num_layers=3, image_size=28)
TINY = PRESETS["tiny"]
IMAGE = {"in_dim": 36, "image_dim": CLIP.dim, "image_tokens": CLIP.tokens}
MODELS: dict[str, ModelConfig] = {
    "t2v": TINY,
    "i2v": replace(TINY, task="i2v", dit=replace(TINY.dit, **IMAGE), image_encoder=CLIP),
    "flf2v": replace(
        TINY, task="flf2v", dit=replace(TINY.dit, **IMAGE, image_frames=2), image_encoder=CLIP
    ),
    "vace": replace(TINY, task="vace", dit=replace(TINY.dit, vace_layers=(0, 2, 4))),
}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = TOOLS / "synthesize.py"
    spec = importlib.util.spec_from_file_location("synthesize", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("task", MODELS)
def test_checkpoint(
    task: str, tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "SHARD_BYTES", 1_500_000)
    tool.synthesize(MODELS[task], tmp_path / "made")
    resolved = plan(ExportOptions(source=tmp_path / "made")).resolved
    checkpoint = resolved.checkpoint
    assert checkpoint.layout == "original"
    assert len(checkpoint.components["dit"].files) > 1
    found, asked = checkpoint.config, MODELS[task]
    assert (found.task, found.dit) == (task, asked.dit)
    assert (found.text_encoder, found.image_encoder) == (asked.text_encoder, asked.image_encoder)
    assert resolved.precision == "bf16"


def test_scaled_8_bit_floats_and_loras(tool: ModuleType, tmp_path: Path) -> None:
    config = MODELS["t2v"]
    tool.synthesize(config, tmp_path / "made", fp8_scaled=True)
    tool.write_lora(config, tmp_path / "lora.safetensors", 3, 1)
    options = ExportOptions(
        source=tmp_path / "made", loras=(str(tmp_path / "lora.safetensors"),)
    )  # fmt: skip
    checkpoint = plan(options).resolved.checkpoint
    linears = 10 * config.dit.num_layers
    (lora,) = checkpoint.loras
    assert (lora.matched, lora.unmatched) == (2 * linears, ())
    plain = plan(ExportOptions(source=tmp_path / "made")).resolved.checkpoint
    kinds = [type(source).__name__ for source in plain.components["dit"].tensors.values()]
    assert kinds.count("Float8Tensor") == linears
    for source in checkpoint.components["dit"].tensors.values():
        assert list(source.iter_converted("BF16"))  # which refuses NaN
