"""Build the engines of a model at full size: what they fuse, time, memory, sizes.

Run it as ``python -m benchmarks.tensorrt t2v-14B --precision fp8 --target rtx:sm89``. It needs
no weights, since engines hold none, and with TensorRT-RTX no GPU. Each line is one engine in JSON,
the last one the whole.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import torch

from wanx.config.models import PRESETS
from wanx.exporter.components import ComponentSpec, component_specs
from wanx.exporter.partition.partition import partition
from wanx.exporter.quantization.quantized_spec import quantized_spec
from wanx.exporter.quantization.recipe import Recipe, dit_candidates, text_recipe
from wanx.exporter.quantization.scheme import SCHEMES, QuantizeOptions
from wanx.exporter.targets.tensorrt.gpus import parse_target
from wanx.exporter.targets.tensorrt.ranges import ranges
from wanx.exporter.targets.tensorrt.target import TensorRTBuilder


def quantised(spec: ComponentSpec, name: str, precision: str, attention: str) -> ComponentSpec:
    """The component as an export to 8 bits has it, every layer that can be with a static scale."""
    config = PRESETS[name]
    if precision == "bf16" or spec.name not in ("dit", "text_encoder"):
        return spec
    if spec.name == "text_encoder":
        return quantized_spec(spec, text_recipe(config.text_encoder))
    options = QuantizeOptions(attention=attention)  # type: ignore[arg-type]
    layers, _ = dit_candidates(config.dit, options)
    attends = [f"blocks.{i}.self_attn.attend" for i in range(config.dit.num_layers)]
    recipe = Recipe(
        scheme=SCHEMES[precision],
        options=options,
        layers=dict.fromkeys(layers, 0.1),
        attention=dict.fromkeys(attends if attention == "fp8" else [], (0.1, 0.1, 0.1)),
    )
    return quantized_spec(spec, recipe)


def main() -> None:
    """Build and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=PRESETS)
    parser.add_argument("--precision", choices=("bf16", "int8", "fp8"), default="fp8")
    parser.add_argument("--attention", choices=("none", "fp8"), default="none")
    parser.add_argument("--target", default="rtx:sm89")
    asked = parser.parse_args()
    target = parse_target(asked.target)
    assert target is not None
    config = PRESETS[asked.model]
    start = time.perf_counter()
    total = 0
    with tempfile.TemporaryDirectory() as name:
        for spec in component_specs(config):
            built = quantised(spec, asked.model, asked.precision, asked.attention)
            begun = time.perf_counter()
            folder = Path(name) / spec.name
            sizes = ranges(config, fp8_attention=asked.attention == "fp8")
            builder = TensorRTBuilder(target=target, ranges=sizes)
            schedule = builder.build(spec.name, partition(built, torch.bfloat16), folder)
            seconds = time.perf_counter() - begun
            for program in schedule.programs.values():
                size = (folder / program.file).stat().st_size
                total += size
                row = {"component": spec.name, "engine": program.file, "bytes": size}
                print(json.dumps(row | {"layers": program.layers}))
            print(json.dumps({"component": spec.name, "seconds": round(seconds, 1)}))
    # Of tracing, here, and of building, in processes that begin as copies of this one.
    who = {"tracing": resource.RUSAGE_SELF, "building": resource.RUSAGE_CHILDREN}
    peak = {name: resource.getrusage(of).ru_maxrss * 1024 for name, of in who.items()}
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": round(seconds, 1), "peak_bytes": peak, "engine_bytes": total}))


if __name__ == "__main__":
    main()
