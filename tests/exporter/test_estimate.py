"""What ``--dry-run`` promises, against real bundles and the published sizes of the models."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from wanx.bundle.reader import Bundle
from wanx.checkpoints.checkpoint import Checkpoint
from wanx.checkpoints.tensors.source import SafetensorsTensor
from wanx.checkpoints.weights import ComponentWeights
from wanx.config.models import PRESETS
from wanx.exporter.calibration.options import CalibrationOptions
from wanx.exporter.components import expected_tensors
from wanx.exporter.estimate import estimate
from wanx.exporter.export import plan
from wanx.exporter.graph.cache import GraphCache
from wanx.exporter.options import ExportOptions, resolve
from wanx.exporter.quantization.recipe import Recipe, dit_candidates, smoothing_of, text_recipe
from wanx.exporter.quantization.scheme import SCHEMES, QuantizeOptions
from wanx.exporter.quantized_weights import write_quantized_weights
from wanx.exporter.trace_component import trace_component
from wanx.exporter.weights import write_weights

# Millions of parameters and numbers of tensors, counted in the published checkpoints.
DIT_SIZES = {
    "t2v-1.3B": (1418.996800, 825),
    "t2v-14B": (14288.491584, 1095),
    "i2v-14B": (16394.878784, 1303),
    "flf2v-14B": (16395.536704, 1304),
    "vace-1.3B": (2153.972032, 1264),
    "vace-14B": (17337.592896, 1331),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_sizes_of_a_real_export(
    precision: str, checkpoint: Path, bundles: Callable[[str], Bundle], tmp_path: Path
) -> None:
    options = ExportOptions(source=checkpoint, output=tmp_path / "bundle", precision=precision)
    needs = plan(options).estimate
    assert list(tmp_path.iterdir()) == []
    bundle = bundles(precision)
    for group, size in needs.weight_bytes.items():
        tensors = load_file(bundle.root / "weights" / f"{group}.safetensors")
        assert size == sum(tensor.nbytes for tensor in tensors.values())
    # The disk is checked against it, so it may not be too small.
    assert bundle.size_bytes <= needs.bundle_bytes <= 1.05 * bundle.size_bytes + (32 << 20)
    assert 0 < needs.seconds < 600


def full_size_checkpoint(preset: str, dtype: str) -> Checkpoint:
    """The headers of a checkpoint without its data."""
    width = {"BF16": 2, "F32": 4}[dtype]
    components = {}
    for group, shapes in expected_tensors(PRESETS[preset]).items():
        components[group] = ComponentWeights(
            component=group,
            tensors={
                name: SafetensorsTensor(
                    name=name,
                    dtype=dtype,
                    shape=shape,
                    nbytes=width * math.prod(shape),
                    file=Path("weights.safetensors"),
                    offset=0,
                )
                for name, shape in shapes.items()
            },
            files=(Path("weights.safetensors"),),
        )
    return Checkpoint(
        source=Path("checkpoint"),
        layout="original",
        config=PRESETS[preset],
        components=components,
        tokenizer=Path("tokenizer.json"),
    )


@pytest.mark.parametrize("preset", DIT_SIZES)
def test_published_numbers_of_parameters(preset: str) -> None:
    tensors = expected_tensors(PRESETS[preset])
    count = {group: sum(map(math.prod, shapes.values())) for group, shapes in tensors.items()}
    millions, number = DIT_SIZES[preset]
    assert count["dit"] == round(millions * 1e6)
    assert len(tensors["dit"]) == number
    assert round(count["text_encoder"] / 1e6) == 5681
    assert len(tensors["text_encoder"]) == 242
    assert round(count["vae"] / 1e5) == 1269
    if preset in ("i2v-14B", "flf2v-14B"):
        # ViT-H/14, 632.1 M with its projection, without the last of its 32 layers.
        assert round(count["image_encoder"] / 1e5) == 6111
    else:
        assert "image_encoder" not in count


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_full_size(dtype: str, tmp_path: Path) -> None:
    """T2V-14B at bf16: 28.6 GB and umT5-xxl's 11.4 GB, whatever they were published in."""
    checkpoint = full_size_checkpoint("t2v-14B", dtype)
    options = ExportOptions(source="t2v-14B", output=tmp_path, precision="bf16")
    needs = estimate(resolve(options, checkpoint))
    assert round(needs.weight_bytes["dit"] / 1e8) == 286
    assert round(needs.weight_bytes["text_encoder"] / 1e8) == 114
    total = sum(needs.weight_bytes.values())
    assert total < needs.bundle_bytes < 1.01 * total
    # Weights pass in chunks, so memory is far below them.
    assert needs.peak_memory_bytes <= 1.5e9
    small = estimate(resolve(options, full_size_checkpoint("t2v-1.3B", dtype)))
    assert small.peak_memory_bytes < needs.peak_memory_bytes
    assert small.seconds < needs.seconds


@pytest.mark.parametrize("preset", DIT_SIZES)
def test_every_task_at_full_size(preset: str, tmp_path: Path) -> None:
    """The image encoder keeps its fp32, 2.4 GB; memory stays that of the graphs."""
    options = ExportOptions(source=preset, output=tmp_path, precision="bf16")
    needs = estimate(resolve(options, full_size_checkpoint(preset, "F32")))
    with_images = preset in ("i2v-14B", "flf2v-14B")
    assert ("image_encoder" in needs.weight_bytes) == with_images
    if with_images:
        assert round(needs.weight_bytes["image_encoder"] / 1e8) == 24
    total = sum(needs.weight_bytes.values())
    assert total < needs.bundle_bytes < 1.01 * total
    assert needs.peak_memory_bytes <= 1.5e9
    size = preset.partition("-")[2]
    plain = estimate(resolve(options, full_size_checkpoint(f"t2v-{size}", "F32")))
    assert needs.seconds - needs.calibration_seconds >= plain.seconds - plain.calibration_seconds


@pytest.mark.parametrize("task", ["i2v", "flf2v", "vace"])
def test_sizes_of_real_exports(
    task: str,
    checkpoint_of: Callable[[str], Path],
    bundle_of: Callable[[str, str], Bundle],
    tmp_path: Path,
) -> None:
    needs = plan(ExportOptions(source=checkpoint_of(task), output=tmp_path / "bundle")).estimate
    bundle = bundle_of(task, "fp32")
    for group, size in needs.weight_bytes.items():
        tensors = load_file(bundle.root / "weights" / f"{group}.safetensors")
        assert size == sum(tensor.nbytes for tensor in tensors.values())
    assert bundle.size_bytes <= needs.bundle_bytes


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("int8", {}),
        ("int8", {"smooth": 0.5, "skip_layers": ("blocks.0.*", "*.ffn.2")}),
        ("fp8", {}),
        ("fp8", {"weight_scale": "tensor"}),
        ("fp8", {"activation_scale": "dynamic", "components": ("dit",)}),
        ("fp8", {"components": ("text_encoder",)}),
    ],
)
def test_sizes_of_8_bit_weights(precision: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Where no layer falls back, which nobody knows before it is measured."""
    quantize = QuantizeOptions(**options)
    planned = plan(ExportOptions(source="tiny", precision=precision, quantize=quantize))
    resolved, needs = planned.resolved, planned.estimate
    config = resolved.checkpoint.config
    wanted, _ = dit_candidates(config.dit, quantize)
    scale = None if quantize.activation_scale == "dynamic" else 0.1
    vectors = {v for name in wanted if quantize.smooth and (v := smoothing_of(name))}
    recipes = {
        "dit": Recipe(
            scheme=SCHEMES[precision],
            options=quantize,
            layers=dict.fromkeys(wanted, scale),
            smooth={vector: torch.ones(config.dit.dim) for vector in vectors},
        ),
        "text_encoder": text_recipe(config.text_encoder),
    }
    for group, size in needs.weight_bytes.items():
        recipe = recipes.get(group) if group in quantize.components else None
        folder = tmp_path / group
        folder.mkdir()
        if recipe is None:
            write_weights(resolved, group, folder, lambda portion: None)
        else:
            write_quantized_weights(resolved, group, folder, lambda portion: None, recipe)
        files = [load_file(file) for file in folder.iterdir()]
        written = sum(tensor.nbytes for tensors in files for tensor in tensors.values())
        assert size == pytest.approx(written, rel=0.01)
        source = resolved.checkpoint.components[group].nbytes
        assert (size < 0.6 * source) == (recipe is not None)


@pytest.mark.parametrize(
    ("precision", "golden_steps", "forwards"),
    [("int8", 3, 2 * 5), ("fp8", 0, 2 * 5), ("bf16", 3, 3), ("bf16", 0, 0)],
)
def test_time_of_calibration(
    precision: str, golden_steps: int, forwards: int, tmp_path: Path
) -> None:
    """A trajectory of 21·30·52 tokens, both branches, or the golden steps of one."""
    checkpoint = full_size_checkpoint("t2v-14B", "BF16")

    def seconds(**options: Any) -> tuple[float, float]:
        calibration = CalibrationOptions(
            prompts=2, steps=5, width=832, height=480, frames=81, **options
        )
        asked = ExportOptions(
            source="x", output=tmp_path, precision=precision, calibration=calibration
        )
        needs = estimate(resolve(asked, checkpoint))
        return needs.calibration_seconds, needs.seconds

    calibrating, whole = seconds(golden_steps=golden_steps)
    operations = 2 * DIT_SIZES["t2v-14B"][0] * 1e6 * 21 * 30 * 52 * 2 * forwards
    assert calibrating == pytest.approx(operations / 150e9, rel=1e-6)
    assert calibrating <= whole
    less, less_whole = seconds(golden_steps=min(golden_steps, 1))
    assert whole - less_whole == pytest.approx(calibrating - less)


def seconds_of(
    cache: GraphCache, precision: str = "bf16", target: str = "cpu", **calibration: Any
) -> float:
    options = ExportOptions(
        source="x", precision=precision, target=target,
        calibration=CalibrationOptions(**{"golden_steps": 0} | calibration),
    )  # fmt: skip
    resolved = resolve(options, full_size_checkpoint("t2v-1.3B", "BF16"))
    return estimate(resolved, cache).seconds


@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8"])
def test_known_graphs_take_no_time(precision: str) -> None:
    """Six of them; a plain export without any to trace does not import PyTorch either."""
    known = seconds_of(GraphCache(), precision)
    traced = seconds_of(GraphCache(use=False), precision)
    assert traced - known == pytest.approx(6 * 4.0 + (4.0 if precision == "bf16" else 0.0))


def test_graphs_of_a_target_are_traced_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Text encoder and DiT in bf16; the VAE computes in fp32 there, as everywhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plain, cuda = (seconds_of(GraphCache(), "bf16", target) for target in ("cpu", "cuda"))
    assert cuda - plain == pytest.approx(2 * 4.0 + 4.0)
    assert seconds_of(GraphCache(), "fp32", "cuda") == seconds_of(GraphCache(), "fp32")


def test_a_graph_that_was_kept_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = replace(PRESETS["tiny"], text_encoder=replace(PRESETS["tiny"].text_encoder, dim=48))
    cache = GraphCache()
    assert not cache.has_graph("text_encoder", config, None)
    cache.graph("text_encoder", config, None, lambda: trace_component("text_encoder", config, None))
    assert cache.has_graph("text_encoder", config, None)
    assert not GraphCache(use=False).has_graph("text_encoder", config, None)


def test_golden_steps_of_a_bundle_take_no_time(tmp_path: Path) -> None:
    """A bundle that is exported again brings them along, unless others are asked for."""
    brought = plan(ExportOptions(source="tiny", output=tmp_path)).estimate
    assert brought.calibration_seconds == 0
    other = CalibrationOptions(golden_steps=2)
    recorded = plan(ExportOptions(source="tiny", output=tmp_path, calibration=other)).estimate
    assert recorded.calibration_seconds > 0
    quantized = plan(ExportOptions(source="tiny", output=tmp_path, precision="int8")).estimate
    assert quantized.calibration_seconds > recorded.calibration_seconds
