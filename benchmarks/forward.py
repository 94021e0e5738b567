"""Measure one DiT forward on the processor: wanx on ONNX Runtime against diffusers in PyTorch.

Run it as ``python -m benchmarks.forward --tokens 1024 4096``, and with ``--int8`` to measure the
quantised graph as well. All have the same weights (T2V-1.3B width, four blocks, random, fp32 in
the original) and the same threads, and take turns in one process; speedups are medians over
rounds. It also prints how far the results are from those of diffusers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import WanTransformer3DModel

from wanx.accuracy.metrics import cosine, sqnr_db
from wanx.checkpoints import key_maps
from wanx.checkpoints.tensors.source import SafetensorsTensor
from wanx.checkpoints.weights import ComponentWeights
from wanx.config.models import DiTConfig
from wanx.config.number_formats import BY_SAFETENSORS
from wanx.exporter.calibration.blockwise_dit import BlockwiseDiT
from wanx.exporter.calibration.calibrate import observer_hooks
from wanx.exporter.calibration.observers import Observers, input_scale
from wanx.exporter.component_writer import save_graph
from wanx.exporter.components import dit_spec
from wanx.exporter.graph.attach import attach_weights
from wanx.exporter.graph.trace import trace
from wanx.exporter.quantization.quantize import quantize_weights, scale_tensors
from wanx.exporter.quantization.quantized_spec import quantized_spec
from wanx.exporter.quantization.recipe import Recipe, dit_candidates, shared_input
from wanx.exporter.quantization.scheme import SCHEMES, QuantizeOptions
from wanx.exporter.targets.onnxruntime.graph import optimize_for_ort
from wanx.files.safetensors import SafetensorsWriter, read_header
from wanx.kernels.timing import interleaved
from wanx.runtime.sessions.onnxruntime.loading import create_session
from wanx.runtime.tokens import patchify, rope_tables, unpatchify

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


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, SafetensorsTensor]:
    """Write the weights of the peer under the names of the original; return where they lie."""
    header = [(name, "F32", tuple(value.shape)) for name, value in tensors.items()]
    with SafetensorsWriter(folder / "dit.safetensors", header) as writer:
        for value in tensors.values():
            writer.write(value.contiguous().numpy().tobytes())
    return {n: SafetensorsTensor.from_ref(ref) for n, ref in writer.header.entries.items()}


def export(sources: dict[str, SafetensorsTensor], folder: Path) -> Path:
    """Write the graph in fp32 as wanx would; return its path."""
    graph = trace(dit_spec(CONFIG))
    refs = {n: read_header(source.file).entries[n] for n, source in sources.items()}
    attach_weights(graph, refs, folder)
    optimize_for_ort(graph)
    save_graph(graph, folder / "dit.onnx")
    return folder / "dit.onnx"


def export_int8(
    sources: dict[str, SafetensorsTensor], folder: Path, feeds: dict[str, np.ndarray]
) -> Path:
    """Write the graph in int8, all layers of the blocks, with scales from one forward."""
    layers, _ = dit_candidates(CONFIG, QuantizeOptions())
    observers = Observers()
    watch = observer_hooks(observers, {shared_input(layer) for layer in layers})
    BlockwiseDiT(CONFIG, sources).run([feeds], watch=watch)
    scales = {n: input_scale(observers[shared_input(n)], 127) for n in layers}
    recipe = Recipe(scheme=SCHEMES["int8"], layers=scales)
    weights = ComponentWeights(component="dit", tensors=dict(sources), files=())
    tensors = quantize_weights(weights, recipe)
    rows = sorted(tensors.items(), key=lambda row: -BY_SAFETENSORS[row[1].dtype].bits)
    header = [(name, source.dtype, source.shape) for name, source in rows]
    with SafetensorsWriter(folder / "int8.safetensors", header) as writer:
        for _, source in rows:
            for chunk in source.iter_bytes():
                writer.write(chunk)
    refs = dict(writer.header.entries)
    extra = scale_tensors(tensors, recipe)
    header = [(name, "F32", tuple(value.shape)) for name, value in extra.items()]
    with SafetensorsWriter(folder / "scales.safetensors", header) as writer:
        for value in extra.values():
            writer.write(value.float().contiguous().numpy().tobytes())
    graph = trace(quantized_spec(dit_spec(CONFIG), recipe))
    attach_weights(graph, refs | writer.header.entries, folder)
    optimize_for_ort(graph)
    save_graph(graph, folder / "int8.onnx")
    return folder / "int8.onnx"


def measure(tokens: int, rounds: int, threads: int, *, int8: bool) -> dict[str, float]:
    """Time ``rounds`` interleaved rounds, after one that is not counted."""
    torch.set_num_threads(threads)
    model = peer()
    grid = GRIDS[tokens]
    generator = np.random.default_rng(0)
    latent = generator.standard_normal((16, grid[0], 2 * grid[1], 2 * grid[2]), np.float32)
    context = generator.standard_normal((1, CONFIG.text_len, CONFIG.text_dim), np.float32)
    cos, sin = rope_tables(grid, CONFIG.rope_dims)
    feeds = {
        "tokens": patchify(latent)[None], "timestep": np.array([900], np.float32),
        "context": context, "rope_cos": cos, "rope_sin": sin,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        original = {key_maps.DIT.to_original(k) or k: v for k, v in model.state_dict().items()}
        sources = write_tensors(folder, original)
        graphs = {"wanx": export(sources, folder)}
        if int8:
            graphs["int8"] = export_int8(sources, folder, feeds)
        sessions = {n: create_session(path, folder, threads=threads) for n, path in graphs.items()}

        def diffusers() -> np.ndarray:
            with torch.inference_mode():
                return model(
                    torch.from_numpy(latent)[None], torch.tensor([900]), torch.from_numpy(context)
                ).sample.numpy()

        results: dict[str, np.ndarray] = {}

        def run(subject: str) -> None:
            if subject == "diffusers":
                results[subject] = diffusers()[0]
            else:
                (velocity,) = sessions[subject].run(["velocity"], feeds)
                results[subject] = unpatchify(velocity[0], grid)

        subjects = ["diffusers", *sessions]
        calls = [partial(run, subject) for subject in subjects]
        # The threads of the one before spin for a while.
        taken = interleaved(calls, torch.device("cpu"), rounds=rounds, warm_ups=1, pause=0.2)
        seconds = dict(zip(subjects, taken, strict=True))
    want = results["diffusers"]
    figures: dict[str, float] = {"tokens": tokens, "threads": threads}
    for subject, times in seconds.items():
        figures[f"{subject}_seconds"] = statistics.median(times)
    for ours, theirs in itertools.combinations(reversed(seconds), 2):
        pairs = zip(seconds[ours], seconds[theirs], strict=True)
        figures[f"{ours}_over_{theirs}"] = statistics.median(b / a for a, b in pairs)
    error = np.abs(results["wanx"] - want).max() / np.abs(want).max()
    figures["relative_difference"] = float(error)
    if int8:
        figures["int8_cosine"] = cosine(results["int8"], want)
        figures["int8_sqnr_db"] = sqnr_db(results["int8"], want)
    return figures


def main() -> None:
    """Parse the command line, measure, print a JSON line per size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", choices=list(GRIDS), default=[1024, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--int8", action="store_true", help="measure the int8 graph too")
    arguments = parser.parse_args()
    for tokens in arguments.tokens:
        figures = measure(tokens, arguments.rounds, arguments.threads, int8=arguments.int8)
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
