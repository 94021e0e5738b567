"""Faults planted into an export of the built-in model, and what must come of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import wanx.exporter.export as exporter
from tests.support.eightbit import trace_once
from wanx.bundle.golden_steps import Golden
from wanx.bundle.reader import Bundle
from wanx.checkpoints.tensors.source import TensorSource
from wanx.checkpoints.weights import ComponentWeights
from wanx.errors import WanxError
from wanx.exporter import quantized_weights, trace_component
from wanx.exporter.calibration.options import CalibrationOptions
from wanx.exporter.options import ExportOptions
from wanx.exporter.quantization import quantize
from wanx.exporter.quantization.choose_recipe import choose_recipe
from wanx.exporter.quantization.quantize import QuantizedTensor
from wanx.exporter.quantization.recipe import Recipe
from wanx.exporter.quantization.scheme import SCHEMES, QuantizeOptions
from wanx.exporter.source import open_source

CALIBRATION = CalibrationOptions(prompts=1, steps=2, golden_steps=2, width=32, height=32, frames=5)
BLOCKS = 6
FP8: dict[str, Any] = {"precision": "fp8"}
FP8_ATTENTION: dict[str, Any] = FP8 | {"attention": "fp8"}
PER_TENSOR: dict[str, Any] = FP8 | {"weight_scale": "tensor"}
DYNAMIC: dict[str, Any] = PER_TENSOR | {"activation_scale": "dynamic"}

Export = Callable[..., Bundle]
Fault = Callable[[pytest.MonkeyPatch], None]
Scales = dict[str, Tensor]
# A fault, the options of the export, and what its error must say.
Case = tuple[Fault, dict[str, Any], tuple[str, ...]]


open_once = functools.cache(open_source)
_CHOSEN: dict[object, tuple[Recipe, Golden]] = {}


def choose_once(*args: Any) -> tuple[Recipe, Golden]:
    _, _, scheme, options, *_ = args
    if (scheme, options) not in _CHOSEN:
        _CHOSEN[scheme, options] = choose_recipe(*args)
    return _CHOSEN[scheme, options]


def exporter_of(folder: Path, patch: pytest.MonkeyPatch) -> Export:
    """Export text encoder and denoiser, and no VAE; what no fault concerns is done once for all."""
    patch.setattr(
        exporter,
        "component_groups",
        lambda config: {"text_encoder": "text_encoder", "dit": "dit"},
    )
    patch.setattr(trace_component, "trace", trace_once)
    patch.setattr(exporter, "open_source", open_once)
    patch.setattr("wanx.exporter.quantization.choose_recipe.choose_recipe", choose_once)

    def act(precision: str = "int8", *, gate: bool = False, **asked: Any) -> Bundle:
        # A gate of 0 dB keeps all blocks alike.
        options = QuantizeOptions(layer_gate_db=0, smooth=0.5, **asked)
        return exporter.export(
            ExportOptions(
                output=folder / "bundle",
                precision=precision,  # type: ignore[arg-type]
                quantize=options,
                calibration=CALIBRATION,
                gate=gate,
                graph_cache=False,
            )
        )

    return act


def require_refused(case: Case, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Plant a fault and export: one line says what is wrong, and nothing is left behind."""
    plant, options, words = case
    export = exporter_of(folder, patch)
    plant(patch)
    with pytest.raises(WanxError) as caught:
        export(**options)
    message = str(caught.value)
    assert type(caught.value) is WanxError
    assert "\n" not in message
    assert all(word in message for word in words), message
    assert list(folder.iterdir()) == []


def every(layer: str) -> list[str]:
    """A layer's names in all blocks."""
    return [f"blocks.{block}.{layer}" for block in range(BLOCKS)]


def another_recipe(
    change: Callable[[Recipe], Recipe], *, graph: bool = True, files: bool = True
) -> Fault:
    """Trace the denoiser, or write its weights, by another recipe than the one that was decided."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        traced = trace_component.quantized_spec
        written = quantized_weights.write_quantized_weights

        def by_another(recipe: Recipe) -> Recipe:
            return change(recipe) if "blocks.0.ffn.2" in recipe.layers else recipe

        if graph:
            patch.setattr(
                trace_component,
                "quantized_spec",
                lambda spec, recipe: traced(spec, by_another(recipe)),
            )
        if files:
            patch.setattr(
                quantized_weights,
                "write_quantized_weights",
                lambda *args: written(*args[:-1], by_another(args[-1])),
            )

    return plant


def without(layer: str) -> Callable[[Recipe], Recipe]:
    return lambda recipe: recipe.without(dict.fromkeys(every(layer), "planted"))


def with_more(layer: str) -> Callable[[Recipe], Recipe]:
    def change(recipe: Recipe) -> Recipe:
        return replace(recipe, layers={**recipe.layers, **dict.fromkeys(every(layer), 0.01)})

    return change


def as_int8(recipe: Recipe) -> Recipe:
    return replace(recipe, scheme=SCHEMES["int8"])


def dynamic(recipe: Recipe) -> Recipe:
    return replace(recipe, layers=dict.fromkeys(recipe.layers))


def high_attention(recipe: Recipe) -> Recipe:
    return replace(recipe, attention={})


def store_wide(patch: pytest.MonkeyPatch) -> None:
    """Write the denoiser's weights as they are."""
    quantised = quantized_weights.quantize_weights
    patch.setattr(
        quantized_weights,
        "quantize_weights",
        lambda source, recipe: (
            source.tensors if source.component == "dit" else quantised(source, recipe)
        ),
    )


def store_as_int8(patch: pytest.MonkeyPatch) -> None:
    """Write numbers and scales of int8 where the recipe says fp8."""
    quantised = quantized_weights.quantize_weights

    def as_asked(source: ComponentWeights, recipe: Recipe) -> dict[str, TensorSource]:
        return quantised(source, as_int8(recipe) if recipe.scheme.name == "fp8" else recipe)

    patch.setattr(quantized_weights, "quantize_weights", as_asked)


def edit_scales(change: Callable[[Scales], None]) -> Fault:
    """Alter the scales before they are written."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        scale_tensors = quantized_weights.scale_tensors

        def altered(*args: Any) -> dict[str, Tensor]:
            found = scale_tensors(*args)
            if "blocks.0.self_attn.q.weight_scale" in found:
                change(found)
            return found

        patch.setattr(quantized_weights, "scale_tensors", altered)

    return plant


def change_every(suffix: str, change: Callable[[Tensor], Tensor]) -> Callable[[Scales], None]:
    def act(scales: Scales) -> None:
        for name in scales:
            if name.endswith(suffix) and name.startswith("blocks."):
                scales[name] = change(scales[name])

    return act


def swap(first: str, second: str) -> Callable[[Scales], None]:
    def act(scales: Scales) -> None:
        assert not torch.equal(scales[first], scales[second])
        scales[first], scales[second] = scales[second], scales[first]

    return act


def only(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Scales], None]:
    return lambda scales: scales.update({name: change(scales[name])})


def edit_numbers(change: Callable[[QuantizedTensor, Tensor, Tensor], Tensor]) -> Fault:
    """Replace the rounding of the denoiser's weights.

    ``change`` gets the weight, some rows in units of their scales, and the scales, which it may
    alter in place; it returns what becomes the 8-bit numbers.
    """

    def plant(patch: pytest.MonkeyPatch) -> None:
        def iter_bytes(self: QuantizedTensor, chunk: int = 1 << 20) -> Iterator[memoryview]:
            whole = None
            if self.per_tensor:
                whole = torch.stack([amax.amax() for _, amax in self._rows(chunk)]).amax()[None]
            done = 0
            for rows, amax in self._rows(chunk):
                scale = (amax if whole is None else whole) / self.scheme.limit
                units = rows.float() / scale[:, None]
                if self.file.name == "dit.safetensors":
                    numbers = change(self, units, scale)
                else:
                    numbers = rounded(self, units, scale)
                self.scale[... if self.per_tensor else slice(done, done + len(rows))] = scale
                done += len(rows)
                stored = (numbers.float() + self.scheme.format.zero_point).to(self.scheme.dtype)
                yield stored.view(torch.uint8).numpy().data.cast("B")

        patch.setattr(QuantizedTensor, "iter_bytes", iter_bytes)

    return plant


def rounded(tensor: QuantizedTensor, units: Tensor, scale: Tensor) -> Tensor:
    return units if tensor.scheme.format.exponent_bits else units.round()


def toward_zero(tensor: QuantizedTensor, units: Tensor, scale: Tensor) -> Tensor:
    if tensor.scheme.dtype == torch.int8:
        return units.trunc()
    nearest = units.to(torch.float8_e4m3fn)
    beyond = nearest.float().abs() > units.abs() * (1 + 1e-6)
    return (nearest.view(torch.uint8) - beyond.to(torch.uint8)).view(torch.float8_e4m3fn)


def floored(tensor: QuantizedTensor, units: Tensor, scale: Tensor) -> Tensor:
    return (units + 1e-5).floor()


def zeros(tensor: QuantizedTensor, units: Tensor, scale: Tensor) -> Tensor:
    return torch.zeros_like(units)


def zeros_of_a_huge_scale(tensor: QuantizedTensor, units: Tensor, scale: Tensor) -> Tensor:
    scale *= 1e20
    return torch.zeros_like(units)


def half_the_range(tensor: QuantizedTensor, units: Tensor, scale: Tensor) -> Tensor:
    scale *= 2
    return rounded(tensor, units / 2, scale)


def one_wrong_number(tensor: QuantizedTensor, units: Tensor, scale: Tensor) -> Tensor:
    numbers = rounded(tensor, units, scale)
    if tensor.name == "blocks.4.ffn.0.weight":
        place = units[-1].abs().argmin()
        numbers[-1, place] += 2
    return numbers


def one_nan(tensor: QuantizedTensor, units: Tensor, scale: Tensor) -> Tensor:
    if tensor.name == "blocks.4.ffn.0.weight":
        units[-1, -1] = torch.nan
    return units


def unsmoothed_weights(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(quantize, "smoothing_of", lambda layer: None)
