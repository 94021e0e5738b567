"""Exported components on ONNX Runtime against diffusers and transformers, at every precision."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from components import run_dit, run_text_encoder, run_vae_decoder
from diffusers import WanPipeline
from onnx import TensorProto
from peers import relative_error
from safetensors import safe_open

from wanx.bundle import Bundle, verify_bundle

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What safetensors, ONNX and torch call the type that a precision stores.
STORED = {
    "fp32": ("F32", TensorProto.FLOAT),
    "bf16": ("BF16", TensorProto.BFLOAT16),
    "fp16": ("F16", TensorProto.FLOAT16),
}
# (frames, height, width) of the latent; 1, 7, 45, 198 and, for a video of 81 frames, 63 tokens.
LATENTS = [(1, 2, 2), (1, 2, 14), (3, 6, 10), (2, 18, 22), (21, 2, 6)]


def rounded(module: torch.nn.Module, precision: str) -> Any:
    """A copy of ``module`` that computes in fp32 with weights rounded to ``precision``."""
    module = copy.deepcopy(module)
    for parameter in module.parameters():
        parameter.copy_(parameter.to(PRECISIONS[precision]))
    return module


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("latent", LATENTS)
def test_dit(
    latent: tuple[int, int, int],
    precision: str,
    peer: WanPipeline,
    bundles: Callable[[str], Bundle],
) -> None:
    x, context = random(16, *latent), random(1, 512, 40)
    context[:, 9:] = 0
    expected = rounded(peer.transformer, precision)(
        torch.from_numpy(x[None]),
        torch.tensor([500.0]),
        torch.from_numpy(context),
        return_dict=False,
    )[0][0]
    out = run_dit(bundles(precision), x, 500.0, context)
    assert out.dtype == np.float32
    assert relative_error(out, expected) <= 1e-5


@pytest.mark.parametrize("timestep", [0.0, 1.0, 999.0, 1000.0])
def test_dit_timesteps(timestep: float, peer: WanPipeline, bundle_fp32: Bundle) -> None:
    x, context = random(16, 1, 4, 6), random(1, 512, 40)
    expected = peer.transformer(
        torch.from_numpy(x[None]), torch.tensor([timestep]), torch.from_numpy(context)
    ).sample[0]
    assert relative_error(run_dit(bundle_fp32, x, timestep, context), expected) <= 1e-5


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("length", [1, 7, 64, 512])
def test_text_encoder(
    length: int, precision: str, peer: WanPipeline, bundles: Callable[[str], Bundle]
) -> None:
    ids = np.random.default_rng(length).integers(0, 60, (1, length))
    expected = rounded(peer.text_encoder, precision)(torch.from_numpy(ids)).last_hidden_state
    assert relative_error(run_text_encoder(bundles(precision), ids), expected) <= 1e-5


@pytest.mark.parametrize("size", [(2, 2), (4, 10), (7, 3)])
@pytest.mark.parametrize("frames", [1, 2, 3, 21])
def test_vae_decoder(
    frames: int, size: tuple[int, int], peer: WanPipeline, bundle_fp32: Bundle
) -> None:
    """1, 5, 9 and 81 frames; the peer decodes them in one call."""
    latent = random(16, frames, *size)
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (peer.vae.config.latents_mean, peer.vae.config.latents_std)
    )
    raw = torch.from_numpy(latent[None]) * std + mean
    expected = peer.vae.decode(raw, return_dict=False)[0][0]
    out = run_vae_decoder(bundle_fp32, latent)
    assert out.shape == (3, 4 * frames - 3, 8 * size[0], 8 * size[1])
    assert relative_error(out, expected) <= 1e-5


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bundle_is_whole(precision: str, bundles: Callable[[str], Bundle]) -> None:
    bundle = bundles(precision)
    assert all(check.problem is None for check in verify_bundle(bundle.root))
    assert bundle.manifest.precision == precision
    assert bundle.manifest.task == "t2v"
    assert bundle.manifest.provenance.source_layout == "diffusers"
    listed = set(bundle.manifest.files)
    found = {p.relative_to(bundle.root).as_posix() for p in bundle.root.rglob("*") if p.is_file()}
    assert found == listed | {"manifest.json"}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_are_stored_as_asked(precision: str, bundles: Callable[[str], Bundle]) -> None:
    """The graphs, the weight files and the manifest agree on what is stored where."""
    bundle = bundles(precision)
    for name, component in bundle.manifest.components.items():
        # The VAE is small, and the reference runs it in fp32.
        stored = "fp32" if name.startswith("vae") else precision
        dtype, onnx_type = STORED[stored]
        for path in (component.graph, *component.engines.values()):
            tensors = external_tensors(bundle, path)
            assert {tensor.data_type for tensor in tensors} == {onnx_type}
            assert component.storage == {dtype: len(tensors)}
            for tensor in tensors:
                location, data = external_data(bundle, tensor)
                assert location in component.weights
                assert data == stored_data(bundle, location, tensor.name, PRECISIONS[stored])


def external_tensors(bundle: Bundle, path: str) -> list[TensorProto]:
    graph = onnx.load(bundle.root / path, load_external_data=False).graph
    return [t for t in graph.initializer if t.data_location == TensorProto.EXTERNAL]


def external_data(bundle: Bundle, tensor: TensorProto) -> tuple[str, bytes]:
    """Where, relative to the bundle, an ONNX tool finds the bytes of ``tensor``, and they."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    assert not Path(place["location"]).is_absolute()
    assert ".." not in Path(place["location"]).parts
    with open(bundle.root / place["location"], "rb") as file:
        file.seek(int(place["offset"]))
        data = file.read(int(place["length"]))
    assert len(data) == int(place["length"])
    return place["location"], data


def stored_data(bundle: Bundle, weights: str, name: str, dtype: torch.dtype) -> bytes:
    """The bytes that the safetensors library finds under ``name``."""
    with safe_open(bundle.root / weights, "pt") as file:
        tensor = file.get_tensor(name)
    assert tensor.dtype == dtype
    return bytes(tensor.flatten().view(torch.uint8).numpy().tobytes())


def test_every_weight_is_used(bundle_fp32: Bundle) -> None:
    """Together the graphs read every stored tensor, but for the encoder of the VAE."""
    used, stored = set(), set()
    for component in bundle_fp32.manifest.components.values():
        for tensor in external_tensors(bundle_fp32, component.graph):
            used.add((external_data(bundle_fp32, tensor)[0], tensor.name))
    for path in (bundle_fp32.root / "weights").iterdir():
        with safe_open(path, "pt") as file:
            stored |= {(f"weights/{path.name}", name) for name in file.keys()}  # noqa: SIM118
    encoder = {
        (path, name)
        for path, name in stored
        if path == "weights/vae.safetensors" and name.startswith(("encoder.", "conv1."))
    }
    assert used == stored - encoder


@pytest.mark.parametrize("precision", PRECISIONS)
def test_graphs_are_valid_onnx(
    precision: str, bundles: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundles(precision)
    monkeypatch.chdir(bundle.root)  # where the checker looks for external data
    paths = sorted(bundle.root.rglob("*.onnx"))
    assert len(paths) == 7  # four components, of which three have a variant for the processor
    for path in paths:
        model = onnx.load(path, load_external_data=False)
        onnx.checker.check_model(model)
        standard = {"", "wanx", "com.microsoft"} if "engines" in path.parts else {"", "wanx"}
        assert {node.domain for node in model.graph.node} <= standard
        assert {node.domain for f in model.functions for node in f.node} <= standard - {"wanx"}


def test_hot_spots_stay_single_nodes(bundle_fp32: Bundle) -> None:
    """Two blocks of each network, as single nodes that a target can put its own kernels in."""
    expected = {
        "dit": {"AdaLN": 5, "Attention": 4, "GatedResidual": 4, "RMSNorm": 4, "RMSNormRope": 2},
        "text_encoder": {"BiasedAttention": 2, "RMSNorm": 5},
        "vae_decoder_first": {"Attention": 1},
        "vae_decoder_rest": {"Attention": 1},
    }
    for component, counts in expected.items():
        model = onnx.load(bundle_fp32.graph_path(component), load_external_data=False)
        found = Counter(node.op_type for node in model.graph.node if node.domain == "wanx")
        assert found == counts
        assert {function.name for function in model.functions} == counts.keys()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_graphs_hold_no_weights(precision: str, bundles: Callable[[str], Bundle]) -> None:
    """What is inside the graph are tables and scalars that the network computes for itself."""
    bundle = bundles(precision)
    for path in bundle.root.rglob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        inside = [t for t in model.graph.initializer if t.data_location != TensorProto.EXTERNAL]
        assert all(math.prod(tensor.dims) <= 512 for tensor in inside)


def test_dynamic_axes(bundle_fp32: Bundle) -> None:
    """The transformer's only dynamic axis is L; outputs are told in terms of the inputs' axes."""

    def shapes(component: str) -> dict[str, list[str | int]]:
        graph = onnx.load(bundle_fp32.graph_path(component), load_external_data=False).graph
        return {
            value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
            for value in (*graph.input, *graph.output)
        }

    assert shapes("dit") == {
        "tokens": [1, "L", 64],
        "timestep": [1],
        "context": [1, 512, 40],
        "rope_cos": ["L", 12],
        "rope_sin": ["L", 12],
        "velocity": [1, "L", 64],
    }
    assert shapes("text_encoder") == {"ids": [1, "n"], "features": [1, "n", 40]}
    first, rest = shapes("vae_decoder_first"), shapes("vae_decoder_rest")
    assert first["latent"] == rest["latent"] == [1, 16, 1, "h", "w"]
    assert first["video"] == [1, 3, 1, "8*h", "8*w"]
    assert rest["video"] == [1, 3, 4, "8*h", "8*w"]
    caches = [name for name in rest if name.startswith("cache_") and not name.endswith("_next")]
    assert caches
    for name in caches:
        assert rest[name] == rest[f"{name}_next"] == first[f"{name}_next"]
