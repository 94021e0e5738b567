"""A step that Polygraphy compares: what its layers give is what PyTorch's give."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from tests.support.eightbit import SMALL
from tests.support.tensorrt_segments import spec_of, tensors_of, values_of
from wanx.builtin import builtin_bundle
from wanx.bundle.golden_steps import GOLDEN, read_golden
from wanx.bundle.reader import Bundle, open_bundle
from wanx.errors import UsageError
from wanx.exporter.components import dit_spec
from wanx.exporter.partition.partition import partition
from wanx.exporter.partition.stateless import StatelessSegment
from wanx.exporter.targets.tensorrt.comparable import with_layer_outputs
from wanx.exporter.targets.tensorrt.debug import INPUTS, REFERENCE, commands, write_step
from wanx.exporter.targets.tensorrt.graph import segment_graph
from wanx.exporter.targets.tensorrt.target import count_layers
from wanx.exporter.targets.tensorrt.worker import build_engine
from wanx.runtime.sessions.tensorrt.library import import_tensorrt

if find_spec("polygraphy") is None:
    pytest.skip("Polygraphy is not installed", allow_module_level=True)
from polygraphy.json import load_json

LINEARS = ("self_attn.o", "cross_attn.q", "cross_attn.k", "cross_attn.v", "cross_attn.o", "ffn.0")


@pytest.fixture(scope="module")
def tiny() -> Bundle:
    return open_bundle(builtin_bundle(), allow_hard_links=True)


@pytest.fixture(scope="module")
def block(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_step(tiny, "dit", "blocks.2", tmp_path_factory.mktemp("debug") / "block")


def run_reference(folder: Path) -> dict[str, np.ndarray]:
    (feeds,) = load_json(str(folder / INPUTS))
    session = onnxruntime.InferenceSession(folder / REFERENCE, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def run_polygraphy(command: str) -> subprocess.CompletedProcess[str]:
    """One of the printed commands, in the Python of the tests."""
    words = shlex.split(command)
    settings = dict(word.split("=", 1) for word in words if word.startswith("POLYGRAPHY"))
    tool = Path(sys.executable).parent / "polygraphy"
    given = [str(tool), *words[words.index("polygraphy") + 1 :]]
    return subprocess.run(
        given, capture_output=True, text=True, check=False, env=os.environ | settings
    )


def test_layers_of_a_step_of_a_real_run(tiny: Bundle, block: Path) -> None:
    """Of the last golden step and branch, in the network as a whole in PyTorch."""
    model = dit_spec(tiny.manifest.config.dit).module().eval()
    stored = load_file(tiny.root / "weights" / "dit.safetensors")
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    model.load_state_dict({n: stored[n].float().reshape(shape) for n, shape in shapes.items()})
    found: dict[str, np.ndarray] = {}

    def keep(name: str) -> Any:
        def hook(module: object, given: object, out: torch.Tensor) -> None:
            found[f"{name}.out"] = out.numpy()

        return hook

    (part,) = (m for n, m in model.named_modules() if n == "blocks.2")
    for name in LINEARS:
        part.get_submodule(name).register_forward_hook(keep(name))
    part.register_forward_hook(keep("x"))
    *_, (_, _, feeds) = read_golden(tiny.root / GOLDEN).samples()
    with torch.inference_mode():
        model(**{name: torch.from_numpy(value) for name, value in feeds.items()})
    ours = run_reference(block)
    assert found.keys() <= ours.keys()
    for name, wanted in found.items():
        np.testing.assert_allclose(ours[name], wanted, atol=1e-4 * np.abs(wanted).max())


def test_all_steps_make_the_golden_answer(tiny: Bundle, tmp_path: Path) -> None:
    *_, (step, branch, _) = read_golden(tiny.root / GOLDEN).samples()
    found = run_reference(write_step(tiny, "dit", "head", tmp_path / "head"))["velocity.out"]
    wanted = step.velocities[branch]
    assert np.linalg.norm(found - wanted) <= 1e-2 * np.linalg.norm(wanted)  # bf16 weights


def test_polygraphy_finds_the_layer(block: Path, tmp_path: Path) -> None:
    """One weight is spoiled: all layers before it agree, and it is the first that does not."""
    reference, compare = commands(block, "rtx")
    done = run_polygraphy(reference)
    assert done.returncode == 0, done.stdout + done.stderr
    spoiled = onnx.load(block / REFERENCE)
    for tensor in spoiled.graph.initializer:
        if tensor.name == "weight.cross_attn.o.weight":
            values = onnx.numpy_helper.to_array(tensor).copy()
            values[::2] *= -1
            tensor.raw_data = values.tobytes()
    onnx.save(spoiled, tmp_path / "spoiled.onnx")
    against = compare.partition("--trt ")[2].partition(" --trt-min")[0]
    done = run_polygraphy(f"polygraphy run {tmp_path}/spoiled.onnx --onnxrt {against}")
    assert done.returncode == 1
    verdicts = [
        (line.split("'")[1], "PASSED" in answer)
        for line, answer in zip(
            done.stdout.splitlines(), done.stdout.splitlines()[1:], strict=False
        )
        if "Comparing Output" in line
    ]
    assert [name for name, passed in verdicts if passed] == [
        "qkv.out", "self_attn.o.out", "norm3.out", *(f"cross_attn.{n}.out" for n in "qkv")
    ]  # fmt: skip
    assert ("cross_attn.o.out", False) in verdicts


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which it goes on")
def test_polygraphy_builds_the_engine_without_a_gpu(block: Path) -> None:
    _, compare = commands(block, "rtx")
    done = run_polygraphy(compare)
    assert "Finished engine building" in done.stdout, done.stdout + done.stderr
    assert "CUDA driver version is insufficient" in done.stdout + done.stderr


@pytest.mark.gpu
def test_polygraphy_compares_with_tensorrt(block: Path) -> None:
    major, minor = torch.cuda.get_device_capability()
    known = find_spec("tensorrt_rtx") is not None and (major, minor) != (9, 0)
    for command in commands(block, "rtx" if known else "tensorrt"):
        done = run_polygraphy(command)
        assert done.returncode == 0, done.stdout + done.stderr


def debug_graph(
    kind: str, dtype: torch.dtype
) -> tuple[onnx.ModelProto, dict[str, np.ndarray], np.ndarray]:
    """The graph of a block, inputs for it, and what PyTorch makes of them."""
    parts = partition(spec_of(SMALL, kind), dtype)
    segment = parts.segments["block"]
    values = values_of(segment, {"B": 1, "L": 32})
    with torch.inference_mode():
        (wanted,) = StatelessSegment(segment, torch.device("cpu"))(*values)
    count = len(segment.inputs)
    inputs = {
        item.name: value.float().numpy()
        for item, value in zip(segment.inputs, values[:count], strict=True)
    }
    weights = tensors_of(segment, values[count:])
    batched = ["x", "modulation", "text"]
    graph = with_layer_outputs(segment_graph(segment, parts.axes), weights, inputs, batched)
    return graph, inputs, wanted.numpy()


@pytest.mark.parametrize(
    ("kind", "products"), [("int8", "gemm Int8"), ("fp8", "gemm FP8"), ("attention", "gemm FP8")]
)
def test_8_bit_layers_are_compared_too(kind: str, products: str) -> None:
    """The same layers as in 16 bits, and all of them are 8-bit products for TensorRT still."""
    wanted = [item.name for item in debug_graph("bf16", torch.float32)[0].graph.output]
    reference, inputs, answer = debug_graph(kind, torch.float32)
    engine, _, _ = debug_graph(kind, torch.bfloat16)
    for graph in (reference, engine):
        assert [item.name for item in graph.graph.output] == wanted
    data = reference.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (found,) = session.run(["x.out"], inputs)
    # A few numbers fall to the other side in 8 bits.
    assert np.linalg.norm(found - answer) <= 3e-3 * np.linalg.norm(answer)
    if find_spec("tensorrt_rtx") is None:
        return
    shapes = {n: [inputs[n].shape] * 2 + [(2, *inputs[n].shape[1:])] for n in ("x", "text")}
    shapes["modulation"] = [(1, 6, SMALL.dim)] * 2 + [(2, 6, SMALL.dim)]
    trt = import_tensorrt("tensorrt_rtx")
    _, lines = build_engine(trt, engine.SerializeToString(), shapes, (89,))
    layers = count_layers(lines)
    assert layers[products] in (7, 8)  # constant weights let k and v of cross attention be one
    assert [name for name in layers if name.startswith("gemm")] == [products]


def test_what_there_is_not(tiny: Bundle, tmp_path: Path, block: Path) -> None:
    with pytest.raises(UsageError, match="--component vae: there is none; choose text_enc"):
        write_step(tiny, "vae", "x", tmp_path / "a")
    with pytest.raises(UsageError, match=r"--step blocks.6: there is none; choose from embed, blo"):
        write_step(tiny, "dit", "blocks.6", tmp_path / "a")
    with pytest.raises(UsageError, match="exists; name a new folder"):
        write_step(tiny, "dit", "head", block)
    assert not (tmp_path / "a").exists()
