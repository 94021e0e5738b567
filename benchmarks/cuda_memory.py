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
from collections.abc import Mapping
from typing import Any

import onnx
import torch

from wanx.benchmarks.speed.roofline.parts import dimensions
from wanx.benchmarks.speed.roofline.shapes import Shapes, inferred
from wanx.config.models import PRESETS, ModelConfig
from wanx.exporter.component_groups import component_groups
from wanx.exporter.components import expected_tensors
from wanx.exporter.graph.cache import GraphCache
from wanx.exporter.graph.stored_graph import graph_to_bytes
from wanx.exporter.trace_component import trace_component
from wanx.kernels.number_formats import FORMATS
from wanx.runtime.sizes import latent_shape, parse_size
from wanx.runtime.tokens import token_grid

# Operators whose result is the memory of their first input.
VIEWS = {"Reshape", "Unsqueeze", "Squeeze", "Identity", "Flatten"}


def peak_bytes(model: onnx.ModelProto, sizes: Mapping[str, int]) -> float:
    """Most bytes of values of a graph at a time, its inputs and outputs included.

    Args:
        model: the graph, whose initialisers do not count.
        sizes: of its dynamic axes, such as ``L``.

    Raises:
        WanxError: a shape does not follow from the sizes.
    """
    for value in (*model.graph.input, *model.graph.output):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_value = dimensions(sizes, axis.dim_param)
    flat = inferred(model)
    shapes, graph = Shapes(flat), flat.graph
    constants = {weight.name for weight in graph.initializer}
    constants |= {n.output[0] for n in graph.node if n.op_type == "Constant"}
    holds: dict[str, str] = {}  # of a view, the value whose memory it is
    # Inputs are the caller's.
    last_use = {value.name: len(graph.node) for value in graph.input}
    for number, node in enumerate(graph.node):
        if node.op_type in VIEWS and node.input[0] not in constants:
            holds[node.output[0]] = holds.get(node.input[0], node.input[0])
        for name in node.input:
            owner = holds.get(name, name)
            last_use[owner] = max(number, last_use.get(owner, 0))
    last_use |= {holds.get(value.name, value.name): len(graph.node) for value in graph.output}
    live = {value.name: shapes.bytes(value.name) for value in graph.input}
    peak = sum(live.values())
    for number, node in enumerate(graph.node):
        for name in node.output:
            if name and name not in holds and name not in constants:
                live[name] = shapes.bytes(name)
        peak = max(peak, sum(live.values()))
        live = {name: size for name, size in live.items() if last_use.get(name, 0) > number}
    return peak


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
