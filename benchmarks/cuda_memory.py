"""Predict the GPU memory of the target ``cuda`` from the graphs, without a GPU or weights.

Run it as ``python -m benchmarks.cuda_memory t2v-14B --sizes 832x480 1280x720``. For each component
that is loaded by itself: its weights, and the most that its values take at a time where each is
freed behind its last use, as ONNX Runtime's plan has it. Attention keeps no scores. Not counted are
what CUDA and its libraries take, what the allocator cannot fill, and of weights in 8 bits the copy
of one layer's in 16.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import onnx
import torch

from wanx.config.models import PRESETS, ModelConfig
from wanx.exporter.component_groups import component_groups
from wanx.exporter.components import expected_tensors
from wanx.exporter.graph.cache import GraphCache
from wanx.exporter.graph.liveness import peak_bytes
from wanx.exporter.graph.stored_graph import graph_to_bytes
from wanx.exporter.trace_component import trace_component
from wanx.kernels.number_formats import FORMATS
from wanx.runtime.sizes import latent_shape, parse_size
from wanx.runtime.tokens import token_grid


def predict(config: ModelConfig, width: int, height: int, frames: int) -> list[dict[str, Any]]:
    """Predict each component of a model; a row for each, in bytes."""
    latent = latent_shape(width, height, frames, config.vae)
    tokens = math.prod(token_grid(latent, config.dit.patch_size))
    sizes = {"L": tokens, "h": latent[2], "w": latent[3], "n": config.dit.text_len}
    shapes = expected_tensors(config)
    cache, rows = GraphCache(), []
    for component, group in component_groups(config).items():
        dtype = torch.float32 if group == "vae" else torch.bfloat16
        model = cache.graph(
            component, config, None,
            lambda name=component, dtype=dtype: trace_component(name, config, None, dtype),
            computes=FORMATS[dtype].name,
        )  # fmt: skip
        count = sum(
            math.prod(shapes[group][name])
            for name, value in model.graph.initializers.items()
            if value.const_value is None
        )
        peak = peak_bytes(onnx.ModelProto.FromString(graph_to_bytes(model)), sizes)
        width_of = {"bf16": 2, "int8": 1 if group in ("dit", "text_encoder") else 2}
        rows.append(
            {"component": component, "values_gb": peak / 1e9}
            | {
                f"weights_{name}_gb": count * (4 if group == "vae" else size) / 1e9
                for name, size in width_of.items()
            }
        )
    return rows


def main() -> None:
    """Parse the command line, predict, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("presets", nargs="+", choices=PRESETS)
    parser.add_argument("--sizes", nargs="+", default=["832x480"])
    parser.add_argument("--frames", type=int, default=81)
    arguments = parser.parse_args()
    rows = [
        {"model": preset, "size": size, "frames": arguments.frames} | row
        for preset in arguments.presets
        for size in arguments.sizes
        for row in predict(PRESETS[preset], *parse_size(size), arguments.frames)
    ]
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
