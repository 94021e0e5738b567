"""8-bit number formats against PyTorch, and every option that is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from wanx.errors import UsageError
from wanx.exporter.calibration.options import CalibrationOptions
from wanx.exporter.options import ExportOptions
from wanx.exporter.quantization.scheme import SCHEMES, QuantizeOptions

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("name", SCHEMES)
def test_formats(name: str, tmp_path: Path) -> None:
    scheme = SCHEMES[name]
    info = torch.finfo if scheme.dtype.is_floating_point else torch.iinfo
    assert scheme.name == name
    assert scheme.limit == info(scheme.dtype).max - scheme.format.zero_point
    save_file({"w": torch.zeros(2, dtype=scheme.dtype)}, tmp_path / "w.safetensors")
    with safe_open(tmp_path / "w.safetensors", framework="pt") as file:
        assert file.get_slice("w").get_dtype() == scheme.stored


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"components": ("dit", "vae")}, "vae has no 8-bit layers; choose dit or text_encoder"),
        ({"components": ("",)}, "has no 8-bit layers; choose dit or text_encoder"),
        ({"components": ()}, "--quantize names nothing; choose dit or text_encoder"),
        ({"smooth": -0.01}, "--smooth is -0.01; choose 0 (off) to 1"),
        ({"smooth": 1.01}, "--smooth is 1.01; choose 0 (off) to 1"),
        ({"smooth": NAN}, "--smooth is nan"),
        ({"percentile": 49.9}, "--percentile is 49.9; choose 50 to 100"),
        ({"percentile": 100.1}, "--percentile is 100.1"),
        ({"percentile": NAN}, "--percentile is nan"),
        ({"layer_gate_db": NAN}, "--layer-gate is nan; choose a finite number"),
        ({"layer_gate_db": -INF}, "--layer-gate is -inf"),
        ({"weight_scale": "row"}, "--weight-scale row is not available; choose channel or tensor"),
        ({"activation_scale": "token"}, "--activation-scale token is not available; choose static"),
        ({"attention": "int8"}, "--attention int8 is not available; choose none or fp8"),
    ],
)
def test_values_that_no_scheme_has(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        QuantizeOptions(**options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize(
    "options",
    [
        {"smooth": 0},
        {"smooth": 1},
        {"percentile": 50},
        {"percentile": 100},
        {"layer_gate_db": -3.5},
        {"components": ("text_encoder",)},
    ],
)
def test_values_at_the_edge(precision: str, options: dict[str, Any]) -> None:
    ExportOptions(precision=precision, quantize=QuantizeOptions(**options))


FP8_ONLY = [
    ("--weight-scale", {"weight_scale": "tensor"}),
    ("--activation-scale", {"activation_scale": "dynamic"}),
    ("--attention", {"attention": "fp8"}),
]


@pytest.mark.parametrize(("flag", "options"), FP8_ONLY)
def test_options_of_fp8_alone(flag: str, options: dict[str, Any]) -> None:
    ExportOptions(precision="fp8", quantize=QuantizeOptions(**options))
    (value,) = options.values()
    with pytest.raises(UsageError, match=f"^{flag} {value} is for --precision fp8, not int8$"):
        ExportOptions(precision="int8", quantize=QuantizeOptions(**options))


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "options",
    [
        *(options for _, options in FP8_ONLY),
        {"smooth": 0.5},
        {"percentile": 99.9},
        {"layer_gate_db": 20.0},
        {"skip_layers": ("blocks.0.*",)},
        {"components": ("dit",)},
    ],
)
def test_nothing_to_quantise(precision: str, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"--precision {precision} quantises nothing; choose int8"):
        ExportOptions(precision=precision, quantize=QuantizeOptions(**options))


@pytest.mark.parametrize(
    ("flag", "name", "values", "least", "most"),
    [
        ("--calibration-prompts", "prompts", (0, -1, 10_001), 1, 10_000),
        ("--calibration-steps", "steps", (0, -1, 1001), 1, 1000),
        ("--golden-steps", "golden_steps", (-1, 101), 0, 100),
    ],
)
def test_amounts_of_calibration(
    flag: str, name: str, values: tuple[int, ...], least: int, most: int
) -> None:
    for value in values:
        with pytest.raises(UsageError, match=f"^{flag} is {value}; choose {least} to {most}$"):
            CalibrationOptions(**{name: value})
    for value in (least, most):
        assert getattr(CalibrationOptions(**{name: value}), name) == value


@pytest.mark.parametrize("block", [16, 32, 128])
def test_weights_of_4_bits_would_pass_no_gate_of_the_transformer(block: int) -> None:
    """Blocks with a scale and an offset each, as ``MatMulNBits`` has them; 16 are its finest."""
    weight = torch.randn(
        4096, block, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    step = (high - low) / 15
    error = ((weight - low) / step).round() * step + low - weight
    sqnr = 10 * torch.log10(weight.square().mean() / error.square().mean())
    assert 15 < sqnr < min(SCHEMES[name].layer_gate_db for name in ("int8", "fp8"))
