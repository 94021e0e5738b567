"""Accuracy of fp8 against bf16 in one full-size block, on the processor.

Run it as ``python -m benchmarks.fp8_block``. Weights and inputs are random, scales are those of
the inputs. What runs is what the target aoti compiles, uncompiled, against a straightforward
PyTorch module in bf16 with the same weights; both also against that module in fp32.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks.gpu.context import BenchContext
from benchmarks.gpu.distances import cosine
from benchmarks.gpu.dit_variants import EagerDiT
from benchmarks.gpu.plain_dit import PlainDiT
from benchmarks.gpu.random_dit import (
    Weights,
    input_amax,
    quantized,
    random_inputs,
    random_weights,
    recipe_of,
    with_blocks,
)
from benchmarks.gpu.sizes import MODELS
from wanx.config.models import DiTConfig
from wanx.exporter.components import dit_spec
from wanx.exporter.quantization.quantized_spec import quantized_spec


def plain(config: DiTConfig, weights: Weights, dtype: torch.dtype) -> PlainDiT:
    """The straightforward module with these weights."""
    with torch.device("meta"):
        model = PlainDiT(config)
    state = {
        name: weights[name].to(dtype).reshape(value.shape)
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def measure(config: DiTConfig, grid: tuple[int, int, int]) -> dict[str, float]:
    """Cosines of the velocity, and of what the block adds to the stream."""
    bench = BenchContext(device=torch.device("cpu"), folder=Path())
    torch.manual_seed(0)
    config = with_blocks(config, 1)
    weights = random_weights(bench, config, torch.bfloat16)
    values, _ = random_inputs(bench, config, grid)
    with torch.inference_mode():
        model = plain(config, weights, torch.bfloat16)
        amax = input_amax(model, values)
        _, before = model(values, [])
        answers = {"bf16": model(values)}
        answers["fp32"] = plain(config, weights, torch.float32)(values)
        for name, attention in (("fp8", False), ("fp8 attention too", True)):
            recipe = recipe_of(config, attention, amax)
            spec = quantized_spec(dit_spec(config), recipe)
            ours = EagerDiT(spec, torch.bfloat16, quantized(weights, recipe))
            answers[name] = ours(values, 1)
        figures = {}
        for one, other in (("fp8", "bf16"), ("fp8 attention too", "bf16"), ("bf16", "fp32")):
            (velocity, x), (right, stream) = answers[one], answers[other]
            figures[f"velocity, {one} to {other}"] = cosine(velocity, right)
            figures[f"block, {one} to {other}"] = cosine(x - before, stream - before)
    return figures


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grid", type=int, nargs=3, default=(4, 16, 16), help="tokens (t, h, w)")
    arguments = parser.parse_args()
    for model in MODELS:
        print(json.dumps({"model": model.name} | measure(model.config, tuple(arguments.grid))))


if __name__ == "__main__":
    main()
