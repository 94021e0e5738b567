"""Small models in every precision, with and without our kernels."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.rtx_builds import needs_rtx, run

BUILD = """
import tempfile
import torch
from tests.support.tensorrt_segments import spec_of
from wanx.config.models import PRESETS
from wanx.exporter.components import text_encoder_spec
from wanx.exporter.quantization.quantized_spec import quantized_spec
from wanx.exporter.quantization.recipe import text_recipe
from wanx.exporter.partition.partition import partition
from wanx.exporter.targets.tensorrt.gpus import TensorRTTarget
from wanx.exporter.targets.tensorrt.ranges import ranges
from wanx.exporter.targets.tensorrt.target import TensorRTBuilder
tiny = PRESETS["tiny"]
text = text_encoder_spec(tiny.text_encoder)
plugins = ("RMSNormRope", "GeluQuantize")
jobs = {
    f"{kind} {names}": (spec_of(tiny.dit, kind), chosen)
    for kind in ("bf16", "int8", "fp8") for names, chosen in (("plain", ()), ("plug-ins", plugins))
}
jobs["text bf16"] = text, ()
jobs["text int8"] = quantized_spec(text, text_recipe(tiny.text_encoder)), ()
found = {}
for name, (spec, chosen) in jobs.items():
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "engines"
        # One GPU where another would differ in nothing that is looked at; each takes as long.
        sms = (89, 120) if name == "fp8 plug-ins" else (89,)
        target = TensorRTTarget(name="rtx", sms=sms)
        builder = TensorRTBuilder(target=target, ranges=ranges(tiny), plugins=chosen)
        schedule = builder.build(spec.name, partition(spec, torch.bfloat16), folder)
        assert schedule.device == "+".join(f"sm{sm}" for sm in sms)
        found[name] = {n: dict(program.layers) for n, program in schedule.programs.items()}
"""


@pytest.fixture(scope="module")
def layers() -> dict[str, dict[str, dict[str, int]]]:
    found: dict[str, Any] = run({"build": BUILD})["build"]
    return found


@needs_rtx
@pytest.mark.parametrize(
    ("kind", "product", "carried"),
    [("bf16", "BFloat16", 1), ("int8", "Int8", 2), ("fp8", "FP8", 2)],
)
def test_denoisers(
    layers: dict[str, dict[str, dict[str, int]]], kind: str, product: str, carried: int
) -> None:
    """Eight products in a block, whoever normalises and quantises between them."""
    for names, custom in (("plain", 0), ("plug-ins", carried)):
        block = layers[f"{kind} {names}"]["block"]
        assert block[f"gemm {product}"] == 8
        assert block["attention BFloat16"] == 2
        assert block.get("custom_layer", 0) == custom
        assert layers[f"{kind} {names}"].keys() == {"embed", "block", "head"}


@needs_rtx
def test_text_encoders(layers: dict[str, dict[str, dict[str, int]]]) -> None:
    """Attention is one kernel with its bias, which blocks differ in; all products are in bf16."""
    for kind in ("bf16", "int8"):
        block = layers[f"text {kind}"]["block"]
        assert block["attention BFloat16"] == 1
        assert {name for name in block if name.startswith("gemm")} == {"gemm BFloat16"}
