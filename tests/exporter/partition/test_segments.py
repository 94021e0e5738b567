"""A component cut into segments, run step by step in PyTorch, against the whole component."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.checkpoints import OUR_CLIP, OUR_DIT, OUR_T5, OUR_VAE, TASKS
from tests.support.eightbit import (
    SMALL,
    build,
    make_recipe,
    quantized_reference,
    random_feeds,
    random_weights,
    run_torch,
)
from tests.support.peers import randomise, relative_error
from wanx.config.models import PRESETS, DiTConfig
from wanx.exporter.components import (
    component_specs,
    dit_spec,
    expected_tensors,
    image_encoder_spec,
    text_encoder_spec,
    vae_decoder_specs,
    vae_encoder_specs,
)
from wanx.exporter.partition.partition import partition
from wanx.exporter.partition.segments import Partition
from wanx.exporter.partition.stateless import StatelessSegment
from wanx.exporter.quantization.quantized_spec import quantize_module, quantized_spec
from wanx.exporter.quantization.recipe import text_recipe
from wanx.exporter.quantization.scheme import QuantizeOptions
from wanx.models.dit.model import WanDiT
from wanx.models.image_encoder import ImageEncoder
from wanx.models.text_encoder import UMT5Encoder

QUANTISED: dict[str, tuple[DiTConfig, str, QuantizeOptions]] = {
    "int8": (SMALL, "int8", QuantizeOptions()),
    "fp8": (TASKS["flf2v"][2], "fp8", QuantizeOptions(smooth=0.5)),
    "fp8, dynamic": (SMALL, "fp8", QuantizeOptions(activation_scale="dynamic")),
    "one scale per weight": (
        TASKS["i2v"][2],
        "fp8",
        QuantizeOptions(weight_scale="tensor", attention="fp8"),
    ),
    "vace": (TASKS["vace"][2], "int8", QuantizeOptions(smooth=0.5)),
}


def run(
    parts: Partition, weights: Mapping[str, Tensor], feeds: Mapping[str, object]
) -> dict[str, Tensor]:
    """Run a cut as a session does, every program as plain PyTorch."""
    values = {name: torch.as_tensor(value) for name, value in feeds.items()}
    for step in parts.steps:
        segment = parts.segments[step.program]
        given = []
        for name, parameter in segment.parameters:
            sources = [weights[step.prefix + s] for s in segment.sources.get(name, (name,))]
            whole = sources[0] if len(sources) == 1 else torch.cat(sources)
            assert whole.numel() == math.prod(parameter.shape)
            given.append(whole.to(parameter.dtype).reshape(parameter.shape))
        with torch.inference_mode():
            made = StatelessSegment(segment, torch.device("cpu"))(
                *(values[n] for n in step.inputs), *given
            )
        values |= dict(zip(step.outputs, made, strict=True))
    return values


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("task", TASKS)
def test_a_denoiser(task: str, batch: int) -> None:
    config = TASKS[task][2]
    weights, feeds = random_weights(config), random_feeds(config)
    shared = ("rope_cos", "rope_sin", "vace_scale")
    for name in feeds.keys() - set(shared):
        noise = np.random.default_rng(1).random((batch, *feeds[name].shape[1:]), np.float32)
        feeds[name] = feeds[name] + noise
    model = WanDiT(config)
    model.load_state_dict(weights)
    found = run(partition(dit_spec(config), torch.float32), weights, feeds)["velocity"]
    assert found.shape[0] == batch
    assert relative_error(found, run_torch(model, feeds)) <= 2e-6


@pytest.mark.parametrize("case", QUANTISED)
def test_a_quantised_denoiser(case: str, tmp_path: Path) -> None:
    config, scheme, options = QUANTISED[case]
    weights, feeds = random_weights(config), random_feeds(config)
    recipe = make_recipe(config, weights, feeds, scheme, options)
    built = build(tmp_path, config, weights, recipe, graphs=False)
    expected = quantized_reference(config, weights, built, feeds)
    plain = WanDiT(config)
    plain.load_state_dict(weights)
    allowed = 0.03 * relative_error(run_torch(plain, feeds), expected)
    parts = partition(quantized_spec(dit_spec(config), recipe), torch.float32)
    found = run(parts, built.tensors(), feeds)["velocity"]
    assert relative_error(found, expected) <= allowed


@pytest.mark.parametrize("kept", [
    ("blocks.1.self_attn.q", "blocks.2.ffn.0", "blocks.0.ffn.2"),
    ("blocks.0.self_attn.k", "blocks.1.cross_attn.q", "blocks.2.self_attn.o"),
])  # fmt: skip
def test_blocks_that_differ(kept: tuple[str, ...], tmp_path: Path) -> None:
    weights, feeds = random_weights(SMALL), random_feeds(SMALL)
    recipe = make_recipe(SMALL, weights, feeds, "int8", kept=kept)
    built = build(tmp_path, SMALL, weights, recipe, graphs=False)
    expected = quantized_reference(SMALL, weights, built, feeds)
    parts = partition(quantized_spec(dit_spec(SMALL), recipe), torch.float32)
    assert list(parts.segments) == ["embed", "block", "block_2", "block_3", "head"]
    plain = WanDiT(SMALL)
    plain.load_state_dict(weights)
    allowed = 0.03 * relative_error(run_torch(plain, feeds), expected)
    assert relative_error(run(parts, built.tensors(), feeds)["velocity"], expected) <= allowed


def test_equal_blocks_share_a_program() -> None:
    with torch.device("meta"):
        parts = partition(dit_spec(PRESETS["t2v-14B"].dit), torch.bfloat16)
    assert list(parts.segments) == ["embed", "block", "head"]
    assert [step.program for step in parts.steps] == ["embed", *["block"] * 40, "head"]
    assert parts.steps[17].prefix == "blocks.16."
    assert all(p.is_meta for s in parts.segments.values() for _, p in s.parameters)


def test_sixteen_bits_stay_close() -> None:
    """In bf16 the stream stays fp32, and what leaves is the fp32 answer to three digits or so."""
    weights, feeds = random_weights(OUR_DIT), random_feeds(OUR_DIT)
    wide, narrow = (
        run(partition(dit_spec(OUR_DIT), dtype), weights, feeds)["velocity"]
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert narrow.dtype == torch.float32
    assert 1e-4 < relative_error(narrow, wide) < 2e-2


def test_a_text_encoder() -> None:
    model = randomise(UMT5Encoder(OUR_T5), seed=3)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9]])
    found = run(
        partition(text_encoder_spec(OUR_T5), torch.float32), model.state_dict(), {"ids": ids}
    )
    with torch.inference_mode():
        assert relative_error(found["features"], model(ids)) <= 1e-6


def test_a_quantised_text_encoder() -> None:
    recipe = text_recipe(OUR_T5)
    model = quantize_module(UMT5Encoder(OUR_T5), recipe)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dtype == torch.uint8:
            parameter.data = torch.randint(
                1, 256, parameter.shape, generator=generator, dtype=torch.uint8
            )
        else:
            parameter.data.uniform_(0.01, 0.02, generator=generator)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    spec = quantized_spec(text_encoder_spec(OUR_T5), recipe)
    found = run(partition(spec, torch.float32), model.state_dict(), {"ids": ids})
    with torch.inference_mode():
        assert relative_error(found["features"], model(ids)) <= 1e-6


def test_an_image_encoder() -> None:
    model = randomise(ImageEncoder(OUR_CLIP), seed=3)
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    parts = partition(image_encoder_spec(OUR_CLIP), torch.float32)
    found = run(parts, model.state_dict(), {"pixels": pixels})
    with torch.inference_mode():
        assert relative_error(found["features"], model(pixels)) <= 1e-6


PARTS = {
    "vae_encoder_down": {"encoder.conv1", "encoder.downsamples"},
    "vae_encoder_mid": {"encoder.middle", "encoder.head", "conv1"},
    "vae_decoder_mid": {"conv2", "decoder.conv1", "decoder.middle"},
    "vae_decoder_up": {"decoder.upsamples", "decoder.head"},
}


def test_a_part_of_a_vae_reads_its_own_weights() -> None:
    specs = [*vae_encoder_specs(OUR_VAE), *vae_decoder_specs(OUR_VAE)]
    for spec in specs:
        parts = partition(spec, torch.float32)
        model = randomise(spec.module(), seed=1).eval()
        values = {
            item.name: torch.randn(item.example(spec.axes).shape)
            for item in (*spec.inputs, *spec.caches)
        }
        found = run(parts, model.state_dict(), values)
        given = list(values.values())[: len(spec.inputs)]
        if spec.caches:
            given.append(list(values.values())[len(spec.inputs) :])
        with torch.inference_mode():
            wanted = model(*given)
        for name, value in zip(spec.outputs, wanted, strict=True):
            torch.testing.assert_close(found[name], value)
        (segment,) = parts.segments.values()
        names = {re.match(r"(\w+coder\.)?\w+", name)[0] for name, _ in segment.parameters}  # type: ignore[index]
        assert names == PARTS[spec.name.rpartition("_")[0]]


@pytest.mark.parametrize("name", ["tiny", "tiny-flf2v", "tiny-vace"])
def test_every_weight_of_a_preset_is_read(name: str) -> None:
    config = PRESETS[name]
    read: dict[str, set[str]] = {}
    for spec in component_specs(config):
        parts = partition(spec, torch.float32)
        for step in parts.steps:
            segment = parts.segments[step.program]
            for parameter, _ in segment.parameters:
                sources = segment.sources.get(parameter, (parameter,))
                read.setdefault(spec.weights, set()).update(step.prefix + s for s in sources)
    wanted = expected_tensors(config)
    for group, names in wanted.items():
        if group == "vae" and config.task == "t2v":
            names = {n: s for n, s in names.items() if n.split(".")[0] in ("decoder", "conv2")}
        assert read[group] == names.keys()
