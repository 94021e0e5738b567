"""Wrong 8-bit weights planted into real exports of the built-in model; none may be published."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support import faults
from wanx.checkpoints.weights import ComponentWeights, open_weights
from wanx.exporter.quantization.recipe import Recipe
from wanx.exporter.quantization.scheme import SCHEMES, QuantizeOptions
from wanx.exporter.quantized_weights import write_quantized_weights

FAULTS: dict[str, faults.Case] = {
    "weight scales of twice the size": (
        faults.edit_scales(faults.change_every(".weight_scale", lambda scale: 2 * scale)),
        {},
        ("these weights do not match their scales: ", "blocks.0.ffn.0.weight", "and 50 more"),
    ),
    "weight scales of half the size, fp8": (
        faults.edit_scales(faults.only("blocks.1.ffn.0.weight_scale", lambda scale: scale / 2)),
        faults.FP8,
        ("these weights do not match their scales: blocks.1.ffn.0.weight;",),
    ),
    "weight scales that are swapped": (
        faults.edit_scales(
            faults.swap("blocks.1.self_attn.k.weight_scale", "blocks.4.cross_attn.q.weight_scale")
        ),
        {},
        (
            "these weights do not match their scales: ",
            "blocks.1.self_attn.k.weight",
            "blocks.4.cross_attn.q.weight",
        ),
    ),
    "weight scales that are swapped, fp8": (
        faults.edit_scales(
            faults.swap("blocks.1.ffn.0.weight_scale", "blocks.2.ffn.0.weight_scale")
        ),
        faults.FP8,
        (
            "these weights do not match their scales: ",
            "blocks.1.ffn.0.weight",
            "blocks.2.ffn.0.weight",
        ),
    ),
    "weight scales one row off": (
        faults.edit_scales(faults.change_every(".weight_scale", lambda scale: scale.roll(1))),
        {},
        ("these weights do not match their scales: blocks.0.cross_attn.k.weight, ", "and 50 more"),
    ),
    "weight scales one row off, fp8": (
        faults.edit_scales(
            faults.only("blocks.5.ffn.2.weight_scale", lambda scale: scale.roll(-1))
        ),
        faults.FP8,
        ("these weights do not match their scales: blocks.5.ffn.2.weight;",),
    ),
    "weight scales that are not numbers": (
        faults.edit_scales(
            faults.only("blocks.1.ffn.0.weight_scale", lambda scale: scale * torch.nan)
        ),
        {},
        ("these weights do not match their scales: blocks.1.ffn.0.weight;",),
    ),
    "one scale where there is one per row": (
        faults.edit_scales(faults.only("blocks.1.ffn.0.weight_scale", lambda scale: scale.amax())),
        {},
        ("these weights do not match their scales: blocks.1.ffn.0.weight;",),
    ),
    "a scale per tensor that is none": (
        faults.edit_scales(
            faults.only("blocks.1.ffn.0.weight_scale", lambda scale: scale * torch.nan)
        ),
        faults.DYNAMIC,
        ("these weights do not match their scales: blocks.1.ffn.0.weight;",),
    ),
    "weights that are stored wide": (
        faults.store_wide,
        {},
        ("these weights do not match their scales: blocks.0.cross_attn.k.weight, ", "and 50 more"),
    ),
    "fp8 stored as int8": (
        faults.store_as_int8,
        faults.FP8,
        ("these weights do not match their scales: blocks.0.cross_attn.k.weight, ", "and 50 more"),
    ),
    "weights that are zero": (
        faults.edit_numbers(faults.zeros),
        {},
        ("these weights do not match their scales: blocks.0.cross_attn.k.weight, ", "and 50 more"),
    ),
    "weights that are zero, per tensor": (
        faults.edit_numbers(faults.zeros_of_a_huge_scale),
        faults.DYNAMIC,
        ("these weights do not match their scales: blocks.0.cross_attn.k.weight",),
    ),
    "weights rounded down": (
        faults.edit_numbers(faults.floored),
        {},
        ("these weights do not match their scales: blocks.0.cross_attn.k.weight, ", "and 50 more"),
    ),
    "weights rounded toward zero": (
        faults.edit_numbers(faults.toward_zero),
        {},
        ("these weights do not match their scales: blocks.0.cross_attn.k.weight, ", "and 50 more"),
    ),
    "weights rounded toward zero, fp8": (
        faults.edit_numbers(faults.toward_zero),
        faults.FP8,
        ("these weights do not match their scales: blocks.0.cross_attn.k.weight, ", "and 50 more"),
    ),
    "weights of seven bits": (
        faults.edit_numbers(faults.half_the_range),
        {},
        ("these weights do not match their scales: blocks.0.cross_attn.k.weight, ", "and 50 more"),
    ),
    "one number two steps off": (
        faults.edit_numbers(faults.one_wrong_number),
        {},
        ("these weights do not match their scales: blocks.4.ffn.0.weight;",),
    ),
    "one number that is none": (
        faults.edit_numbers(faults.one_nan),
        faults.DYNAMIC,
        ("these weights do not match their scales: blocks.4.ffn.0.weight;",),
    ),
    "weights that are not smoothed": (
        faults.unsmoothed_weights,
        {},
        (
            "scales: blocks.0.ffn.0.weight, blocks.0.self_attn.k.weight",
            "and 14 more",
        ),
    ),
    "smoothing vectors that are swapped": (
        faults.edit_scales(faults.swap("blocks.1.attn_smooth", "blocks.1.ffn_smooth")),
        {},
        (
            "these smoothing vectors are not those of the recipe: ",
            "blocks.1.attn_smooth, blocks.1.ffn_smooth",
        ),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_stops_the_export(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults.require_refused(FAULTS[fault], tmp_path, monkeypatch)


LAYER = "blocks.0.ffn.2"


@pytest.mark.parametrize("shape", [(1, 1), (9, 7), (1500, 1001)])
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sound_weights_are_not_refused(
    dtype: torch.dtype, scheme: str, per_tensor: bool, shape: tuple[int, int], tmp_path: Path
) -> None:
    """Rows of zeros, tiny and huge ones, and more than is looked at."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) * torch.logspace(-37, 3, shape[0])[:, None]
    weight[-3:-2] = 0
    write(weight.to(dtype), scheme, per_tensor, tmp_path)


@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-31])
@pytest.mark.parametrize("per_tensor", [False, True])
def test_tensors_that_become_zeros(per_tensor: bool, size: float, tmp_path: Path) -> None:
    write(torch.full((3, 5), size), "fp8", per_tensor, tmp_path)


def write(weight: torch.Tensor, scheme: str, per_tensor: bool, folder: Path) -> None:
    """Write a weight as an export does, which reads it back."""
    save_file({f"{LAYER}.weight": weight}, folder / "dit.safetensors")
    tensors, files = open_weights(folder, "dit")
    component = ComponentWeights(component="dit", tensors=tensors, files=files)
    resolved: Any = SimpleNamespace(
        checkpoint=SimpleNamespace(components={"dit": component}),
        stored_type=lambda _, source: source.dtype,
    )
    options = QuantizeOptions(weight_scale="tensor" if per_tensor else "channel")
    recipe = Recipe(scheme=SCHEMES[scheme], options=options, layers={LAYER: 1.0})
    (folder / "weights").mkdir()
    write_quantized_weights(resolved, "dit", folder / "weights", lambda _: None, recipe)
