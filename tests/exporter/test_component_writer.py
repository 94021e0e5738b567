"""What is in the bundles of every task: graphs, their shapes, and the weights that they read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto
from safetensors import safe_open

from tests.support.peers import TASKS
from wanx.bundle.reader import Bundle, verify_bundle

BundleOf = Callable[[str, str], Bundle]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What safetensors and ONNX call the type that a precision stores.
STORED = {
    "fp32": ("F32", TensorProto.FLOAT),
    "bf16": ("BF16", TensorProto.BFLOAT16),
    "fp16": ("F16", TensorProto.FLOAT16),
}
BUNDLES = [
    *(("t2v", precision) for precision in PRECISIONS),
    ("i2v", "fp16"),
    ("flf2v", "bf16"),
    ("vace", "fp32"),
]
_ENCODERS = [f"vae_encoder_{p}" for p in ("down_first", "down_rest", "mid_first", "mid_rest")]
_DECODERS = [f"vae_decoder_{p}" for p in ("mid_first", "mid_rest", "up_first", "up_rest")]
_DENOISER = ["dit", *_DECODERS]
COMPONENTS = {
    "t2v": ["text_encoder", *_DENOISER],
    "i2v": ["text_encoder", "image_encoder", *_ENCODERS, *_DENOISER],
    "flf2v": ["text_encoder", "image_encoder", *_ENCODERS, *_DENOISER],
    "vace": ["text_encoder", *_ENCODERS, *_DENOISER],
}


@pytest.mark.parametrize(("task", "precision"), BUNDLES)
def test_bundle_is_whole(task: str, precision: str, bundle_of: BundleOf) -> None:
    bundle = bundle_of(task, precision)
    assert all(check.problem is None for check in verify_bundle(bundle))
    assert bundle.manifest.precision == precision
    assert bundle.manifest.task == task
    assert bundle.manifest.provenance.source_layout == "diffusers"
    listed = set(bundle.manifest.files)
    found = {p.relative_to(bundle.root).as_posix() for p in bundle.root.rglob("*") if p.is_file()}
    assert found == listed | {"manifest.json"}


@pytest.mark.parametrize(("task", "precision"), BUNDLES)
def test_weights_are_stored_as_asked(task: str, precision: str, bundle_of: BundleOf) -> None:
    """The graphs, the weight files and the manifest agree on what is stored where."""
    bundle = bundle_of(task, precision)
    for name, component in bundle.manifest.components.items():
        # The others are small; they stay as the checkpoint has them.
        stored = precision if name in ("dit", "text_encoder") else "fp32"
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


@pytest.mark.parametrize("task", TASKS)
def test_every_weight_is_used(task: str, bundle_of: BundleOf) -> None:
    """Together the graphs read every stored tensor; from text alone nothing is encoded."""
    bundle = bundle_of(task, "fp32")
    used, stored = set(), set()
    for component in bundle.manifest.components.values():
        for tensor in external_tensors(bundle, component.graph):
            used.add((external_data(bundle, tensor)[0], tensor.name))
    for path in (bundle.root / "weights").iterdir():
        with safe_open(path, "pt") as file:
            stored |= {(f"weights/{path.name}", name) for name in file.keys()}  # noqa: SIM118
    encoder = {
        (path, name)
        for path, name in stored
        if path == "weights/vae.safetensors" and name.startswith(("encoder.", "conv1."))
    }
    assert used == (stored - encoder if task == "t2v" else stored)


@pytest.mark.parametrize(("task", "precision"), BUNDLES)
def test_graphs_are_valid_onnx(
    task: str, precision: str, bundle_of: BundleOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundle_of(task, precision)
    monkeypatch.chdir(bundle.root)  # where the checker looks for external data
    paths = sorted(bundle.root.rglob("*.onnx"))
    # Those that attend, but for the text encoder, have a variant for the processor.
    alone = ("text_encoder", "vae_encoder_down", "vae_decoder_up")
    attend = [name for name in COMPONENTS[task] if not name.startswith(alone)]
    assert len(paths) == len(COMPONENTS[task]) + len(attend)
    for path in paths:
        model = onnx.load(path, load_external_data=False)
        onnx.checker.check_model(model)
        standard = {"", "wanx", "com.microsoft"} if "engines" in path.parts else {"", "wanx"}
        assert {node.domain for node in model.graph.node} <= standard
        assert {node.domain for f in model.functions for node in f.node} <= standard - {"wanx"}


# Two blocks of each network and three of CLIP; with VACE three blocks and two that make hints.
MIDDLE = {"Attention": 1, "ChannelNorm": 5}  # two blocks around attention
HOT_SPOTS: dict[str, dict[str, int]] = {
    "t2v": {"AdaLN": 5, "Attention": 4, "GatedResidual": 4, "RMSNorm": 4, "RMSNormRope": 2},
    "i2v": {"AdaLN": 5, "Attention": 6, "GatedResidual": 4, "RMSNorm": 6, "RMSNormRope": 2},
    "flf2v": {"AdaLN": 5, "Attention": 6, "GatedResidual": 4, "RMSNorm": 6, "RMSNormRope": 2},
    "vace": {"AdaLN": 11, "Attention": 10, "GatedResidual": 10, "RMSNorm": 10, "RMSNormRope": 5},
    "text_encoder": {"BiasedAttention": 2, "RMSNorm": 5},
    "image_encoder": {"Attention": 3},
    **{f"vae_encoder_down_{chunk}": {"ChannelNorm": 8} for chunk in ("first", "rest")},
    **{f"vae_encoder_mid_{chunk}": MIDDLE | {"ChannelNorm": 6} for chunk in ("first", "rest")},
    **{f"vae_decoder_mid_{chunk}": MIDDLE for chunk in ("first", "rest")},
    **{f"vae_decoder_up_{chunk}": {"ChannelNorm": 17} for chunk in ("first", "rest")},
}


@pytest.mark.parametrize("task", TASKS)
def test_hot_spots_stay_single_nodes(task: str, bundle_of: BundleOf) -> None:
    """A target can put its own kernels in their places."""
    bundle = bundle_of(task, "fp32")
    for component in bundle.manifest.components:
        model = onnx.load(bundle.graph_path(component), load_external_data=False)
        found = Counter(node.op_type for node in model.graph.node if node.domain == "wanx")
        counts = HOT_SPOTS[task if component == "dit" else component]
        assert found == counts, component
        assert {function.name for function in model.functions} == counts.keys()


@pytest.mark.parametrize(("task", "precision"), BUNDLES)
def test_graphs_hold_no_weights(task: str, precision: str, bundle_of: BundleOf) -> None:
    """What is inside the graph are tables and scalars that the network computes for itself."""
    bundle = bundle_of(task, precision)
    for path in bundle.root.rglob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        inside = [t for t in model.graph.initializer if t.data_location != TensorProto.EXTERNAL]
        assert all(math.prod(tensor.dims) <= 512 for tensor in inside)


@pytest.mark.parametrize("task", TASKS)
def test_components(task: str, bundle_of: BundleOf) -> None:
    """In the order of a run, and with the names that the graphs have."""
    components = bundle_of(task, "fp32").manifest.components
    assert list(components) == COMPONENTS[task]
    for name, component in components.items():
        model = onnx.load(bundle_of(task, "fp32").graph_path(name), load_external_data=False)
        assert component.inputs == tuple(value.name for value in model.graph.input)
        assert component.outputs == tuple(value.name for value in model.graph.output)
        assert model.graph.name == name


def shapes(bundle: Bundle, component: str) -> dict[str, list[str | int]]:
    graph = onnx.load(bundle.graph_path(component), load_external_data=False).graph
    return {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


@pytest.mark.parametrize(
    ("task", "extra"),
    [
        ("t2v", {}),
        ("i2v", {"tokens": [1, "L", 144], "image_context": [1, 5, 48]}),
        ("flf2v", {"tokens": [1, "L", 144], "image_context": [1, 10, 48]}),
        ("vace", {"vace_tokens": [1, "L", 384], "vace_scale": [2]}),
    ],
)
def test_axes_of_the_transformer(
    task: str, extra: dict[str, list[str | int]], bundle_of: BundleOf
) -> None:
    """The only dynamic axis is L."""
    assert (
        shapes(bundle_of(task, "fp32"), "dit")
        == {
            "tokens": [1, "L", 64],
            "timestep": [1],
            "context": [1, 512, 40],
            "rope_cos": ["L", 12],
            "rope_sin": ["L", 12],
            "velocity": [1, "L", 64],
        }
        | extra
    )


def test_axes_of_the_encoders(bundle_of: BundleOf) -> None:
    bundle = bundle_of("i2v", "fp32")
    assert shapes(bundle, "text_encoder") == {"ids": [1, "n"], "features": [1, "n", 40]}
    assert shapes(bundle, "image_encoder") == {"pixels": [1, 3, 28, 28], "features": [1, 5, 48]}


@pytest.mark.parametrize(
    ("part", "coarse", "fine", "count"),
    [
        ("encoder_down", "features", "video", 11),
        ("encoder_mid", "latent", "features", 5),
        ("decoder_mid", "latent", "features", 5),
        ("decoder_up", "features", "video", 19),
    ],
)
def test_axes_of_the_vae(
    part: str, coarse: str, fine: str, count: int, bundle_of: BundleOf
) -> None:
    """All sizes are told in terms of the latent's, and what is kept has the shape it is fed in."""
    bundle = bundle_of("i2v", "fp32")
    vae = bundle.manifest.config.vae
    first, rest = (shapes(bundle, f"vae_{part}_{chunk}") for chunk in ("first", "rest"))
    sizes = {
        "latent": [[1, 16, 1, "h", "w"]] * 2,
        "features": [[1, vae.base_dim * vae.multipliers[-1], 1, "h", "w"]] * 2,
        "video": [[1, 3, frames, "8*h", "8*w"] for frames in (1, 4)],
    }
    for name in (coarse, fine):
        assert [first[name], rest[name]] == sizes[name]
    caches = [name for name in rest if name.startswith("cache_") and not name.endswith("_next")]
    assert len(caches) == count
    for name in caches:
        assert rest[name] == rest[f"{name}_next"] == first[f"{name}_next"]
