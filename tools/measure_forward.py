"""Measure one DiT forward on the processor: wanx on ONNX Runtime against diffusers in PyTorch.

Run it as ``python tools/measure_forward.py --tokens 1024 4096``. Both have the same weights
(T2V-1.3B width, four blocks, fp32, random) and the same threads, and take turns in one process; the
speedup is the median over pairs. It also prints the largest relative difference of the results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import WanTransformer3DModel

from wanx.config import DiTConfig
from wanx.export.attach import attach
from wanx.export.components import dit_spec
from wanx.export.exporter import save_graph
from wanx.export.targets import onnxruntime as target
from wanx.export.trace import trace
from wanx.models import key_maps
from wanx.runtime.sessions.onnxruntime import create_session
from wanx.runtime.tokens import patchify, rope_tables, unpatchify
from wanx.safetensors_file import SafetensorsWriter

CONFIG = DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=4)
GRIDS = {1024: (1, 32, 32), 4096: (4, 32, 32)}


def peer() -> WanTransformer3DModel:
    """Build diffusers' transformer with random weights."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=CONFIG.num_heads,
        attention_head_dim=CONFIG.head_dim,
        ffn_dim=CONFIG.ffn_dim,
        num_layers=CONFIG.num_layers,
        cross_attn_norm=True,
    )
    return model.eval().requires_grad_(False)


def export(model: WanTransformer3DModel, folder: Path) -> Path:
    """Write the graph and the weights of the peer as wanx would; return the graph's path."""
    tensors = {key_maps.DIT.to_original(k): v for k, v in model.state_dict().items()}
    header = [(name, "F32", tuple(value.shape)) for name, value in tensors.items()]
    with SafetensorsWriter(folder / "dit.safetensors", header) as writer:
        for value in tensors.values():
            writer.write(value.contiguous().numpy().tobytes())
    graph = trace(dit_spec(CONFIG))
    attach(graph, writer.header.entries, folder)
    target.specialise(graph)
    save_graph(graph, folder / "dit.onnx")
    return folder / "dit.onnx"


def measure(tokens: int, pairs: int, threads: int) -> dict[str, float]:
    """Time ``pairs`` pairs after one that is not counted."""
    torch.set_num_threads(threads)
    model = peer()
    with tempfile.TemporaryDirectory() as name:
        session = create_session(export(model, Path(name)), Path(name), threads=threads)
        grid = GRIDS[tokens]
        generator = np.random.default_rng(0)
        latent = generator.standard_normal((16, grid[0], 2 * grid[1], 2 * grid[2]), np.float32)
        context = generator.standard_normal((1, CONFIG.text_len, CONFIG.text_dim), np.float32)
        cos, sin = rope_tables(grid, CONFIG.rope_dims)
        feeds = {
            "tokens": patchify(latent)[None], "timestep": np.array([900], np.float32),
            "context": context, "rope_cos": cos, "rope_sin": sin,
        }  # fmt: skip
        ours, theirs = [], []
        for _ in range(pairs + 1):
            start = time.perf_counter()
            (velocity,) = session.run(["velocity"], feeds)
            middle = time.perf_counter()
            with torch.inference_mode():
                want = model(
                    torch.from_numpy(latent)[None], torch.tensor([900]), torch.from_numpy(context)
                ).sample
            ours.append(middle - start)
            theirs.append(time.perf_counter() - middle)
    got = unpatchify(velocity[0], grid)
    error = float(np.abs(got - want[0].numpy()).max() / np.abs(want.numpy()).max())
    return {
        "tokens": tokens,
        "threads": threads,
        "wanx_seconds": statistics.median(ours[1:]),
        "diffusers_seconds": statistics.median(theirs[1:]),
        "speedup": statistics.median(b / a for a, b in zip(ours[1:], theirs[1:], strict=True)),
        "relative_difference": error,
    }


def main() -> None:
    """Parse the command line, measure, print a JSON line per size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", choices=list(GRIDS), default=[1024, 4096])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    for tokens in arguments.tokens:
        print(json.dumps(measure(tokens, arguments.pairs, arguments.threads)), flush=True)


if __name__ == "__main__":
    main()
