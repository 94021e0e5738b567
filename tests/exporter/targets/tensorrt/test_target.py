"""Engines without weights: their graphs in ONNX Runtime, and what TensorRT-RTX makes of them."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import wanx
from tests.support.checkpoints import OUR_CLIP, OUR_T5, TASKS
from tests.support.eightbit import SMALL
from tests.support.onnx_runs import as_numpy
from tests.support.tensorrt_segments import KINDS, spec_of, values_of
from wanx.accuracy.metrics import cosine, psnr_db
from wanx.builtin import builtin_bundle
from wanx.bundle.engine_schedule import EngineSchedule, read_schedule
from wanx.bundle.reader import open_bundle, read_bundle, verify_bundle
from wanx.config.models import PRESETS
from wanx.errors import UsageError, WanxError
from wanx.exporter.components import (
    dit_spec,
    image_encoder_spec,
    text_encoder_spec,
    vae_decoder_specs,
    vae_encoder_specs,
)
from wanx.exporter.partition.partition import partition
from wanx.exporter.partition.segments import Segment
from wanx.exporter.partition.stateless import StatelessSegment
from wanx.exporter.quantization.quantized_spec import quantized_spec
from wanx.exporter.quantization.recipe import text_recipe
from wanx.exporter.targets.options import DEFAULT_OPTIONS
from wanx.exporter.targets.tensorrt import gpus, target
from wanx.exporter.targets.tensorrt.graph import OUTPUT, WEIGHT, segment_graph
from wanx.exporter.targets.tensorrt.ranges import Range, ranges
from wanx.exporter.targets.tensorrt.target import TensorRTBuilder
from wanx.exporter.targets.tensorrt.worker import build_engine, choose_gpus
from wanx.models.vae import WanVAE
from wanx.runtime.options import RunOptions
from wanx.runtime.pipeline import Pipeline
from wanx.runtime.sessions.tensorrt.library import import_tensorrt

if find_spec("tensorrt_rtx") is None:
    pytest.skip("TensorRT-RTX is not installed", allow_module_level=True)
trt = import_tensorrt("tensorrt_rtx")
AMPERE_PLUS = gpus.TensorRTTarget(name="tensorrt", sms=(80,), ampere_plus=True)
WIDE = replace(PRESETS["t2v-1.3B"].dit, num_layers=2)


def layers_of(
    segment: Segment, axes: dict[str, int], sms: Sequence[int], sizes: Mapping[str, Range]
) -> tuple[bytes, dict[str, int]]:
    """Build in this process; return the engine and its layers."""
    graph = segment_graph(segment, axes).SerializeToString()
    engine, lines = build_engine(trt, graph, target.shapes_of(segment, sizes), sms)
    return engine, target.count_layers(lines)


def run_graph(segment: Segment, traced: dict[str, int], values: list[Tensor]) -> list[Tensor]:
    model = segment_graph(segment, traced)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [item.name for item in session.get_inputs()]
    wanted = [item.name for item in segment.inputs]
    assert names == [*wanted, *(f"{WEIGHT}{name}" for name, _ in segment.parameters)]
    assert [o.name for o in session.get_outputs()] == [f"{OUTPUT}{n}" for n in segment.outputs]
    feeds = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(as_numpy(value), ONNX_FLOAT8)
        if value.dtype == torch.float8_e4m3fn
        else onnxruntime.OrtValue.ortvalue_from_numpy(as_numpy(value))
        for name, value in zip(names, values, strict=True)
    }
    outputs = [item.name for item in session.get_outputs()]
    return [
        torch.from_numpy(np.asarray(value.numpy()))
        for value in session.run_with_ort_values(outputs, feeds)
    ]


ONNX_FLOAT8 = 17


def require_same(
    segment: Segment, traced: dict[str, int], axes: dict[str, int], allowed: float
) -> None:
    """Compare at other sizes than those that it was traced with."""
    values = values_of(segment, axes)
    with torch.inference_mode():
        wanted = StatelessSegment(segment, torch.device("cpu"))(*values)
    # TensorRT takes weights of uint8 around zero.
    signed = [(v.short() - 128).to(torch.int8) if v.dtype == torch.uint8 else v for v in values]
    for found, right in zip(run_graph(segment, traced, signed), wanted, strict=True):
        assert found.shape == right.shape
        error = (found.double() - right.double()).norm()
        assert error <= allowed * right.double().norm()


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_compute_what_their_segments_do(kind: str) -> None:
    """In fp32, since ONNX Runtime has no bf16. A few numbers fall to the other side in 8 bits."""
    parts = partition(spec_of(SMALL, kind), torch.float32)
    for name, segment in parts.segments.items():
        exact = kind == "bf16" or name != "block"
        require_same(segment, parts.axes, {"B": 2, "L": 13}, 1e-5 if exact else 3e-3)


@pytest.mark.parametrize("task", ["i2v", "vace"])
def test_graphs_of_other_tasks(task: str) -> None:
    parts = partition(dit_spec(TASKS[task][2]), torch.float32)
    for segment in parts.segments.values():
        require_same(segment, parts.axes, {"B": 1, "L": 11}, 1e-5)


def test_graphs_of_encoders() -> None:
    quantised = quantized_spec(text_encoder_spec(OUR_T5), text_recipe(OUR_T5))
    for spec in (text_encoder_spec(OUR_T5), quantised, image_encoder_spec(OUR_CLIP)):
        parts = partition(spec, torch.float32)
        for segment in parts.segments.values():
            require_same(segment, parts.axes, {"n": 7}, 1e-5)


def test_graphs_of_the_vae() -> None:
    config = PRESETS["tiny"].vae
    for spec in (*vae_encoder_specs(config)[::2], *vae_decoder_specs(config)[1::2]):
        parts = partition(spec, torch.float32)
        (segment,) = parts.segments.values()
        require_same(segment, parts.axes, {"h": 3, "w": 5}, 1e-4)


def test_the_vae_in_bf16() -> None:
    """Every convolution is one kernel in bf16, and so is what is kept from chunk to chunk."""
    for spec, attends in zip(vae_decoder_specs(PRESETS["tiny"].vae)[1::2], (1, 0), strict=True):
        parts = partition(spec, torch.bfloat16)
        (segment,) = parts.segments.values()
        assert {item.dtype for item in segment.inputs} == {torch.float32, torch.bfloat16}
        (fed,) = spec.inputs
        assert parts.input_dtypes[fed.name] == "F32"
        assert {kind for name, kind in parts.input_dtypes.items() if name != fed.name} == {"BF16"}
        _, found = layers_of(segment, parts.axes, (89,), ranges(PRESETS["tiny"]))
        convolutions = {n: c for n, c in found.items() if n.startswith(("conv", "corr"))}
        kernels = [p for _, p in segment.parameters if p.dim() > 3 and p.shape[1] > 1]
        assert convolutions == {"correlation BFloat16": len(kernels)}
        # Attention: its scores, and the sums of values.
        assert found.get("gemm BFloat16", 0) == 2 * attends


def test_the_vae_in_bf16_draws_the_same_frames() -> None:
    bundle = open_bundle(builtin_bundle(), allow_hard_links=True)
    config = bundle.manifest.config.vae
    with safe_open(bundle.root / "weights" / "vae.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    latents: list[np.ndarray] = []
    Pipeline(bundle).run(
        RunOptions(seed=1, steps=10), on_step=lambda step, steps, latent: latents.append(latent)
    )
    latent = torch.from_numpy(latents[-1])[None]
    videos = []
    for dtype in (torch.float32, torch.bfloat16):
        vae = WanVAE(config)
        shapes = {name: parameter.shape for name, parameter in vae.named_parameters()}
        vae.load_state_dict({n: stored[n].reshape(shape) for n, shape in shapes.items()})
        with torch.no_grad():
            videos.append(vae.to(dtype).decode(latent).float().numpy())
            if dtype == torch.bfloat16:
                back = vae.encode(torch.from_numpy(videos[0])).float().numpy()
            else:
                encoded = vae.encode(torch.from_numpy(videos[0])).numpy()
    assert cosine(videos[1], videos[0]) > 0.9999
    assert cosine(back, encoded) > 0.999
    frames = [np.rint(v[0].transpose(1, 2, 3, 0) * 127.5 + 127.5).astype(np.uint8) for v in videos]
    assert psnr_db(frames[1], frames[0]).min() > 45


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("bf16", {"attention BFloat16": 2, "gemm BFloat16": 8}),
        ("int8", {"attention BFloat16": 2, "gemm Int8": 8}),
        ("fp8", {"attention BFloat16": 2, "gemm FP8": 8}),
        ("rows", {"attention BFloat16": 2, "gemm FP8": 8}),
        ("attention", {"attention BFloat16": 1, "attention FP8": 1, "gemm FP8": 8}),
    ],
)
def test_a_block_of_full_size(kind: str, layers: dict[str, int]) -> None:
    """q, k and v are one product; nothing but the listed ones multiplies."""
    parts = partition(spec_of(WIDE, kind), torch.bfloat16)
    sizes = ranges(PRESETS["t2v-1.3B"], fp8_attention=kind == "attention")
    segment = parts.segments["block"]
    sms = (89, 120) if kind == "attention" else (89,)
    engine, found = layers_of(segment, parts.axes, sms, sizes)
    target.require_layers(segment, found)
    products = {n: c for n, c in found.items() if n.startswith(("gemm", "attention", "runtime"))}
    assert products == layers
    weights = sum(p.numel() * p.element_size() for _, p in segment.parameters)
    assert len(engine) < 0.3 * len(sms) * weights


def test_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every component of an image-to-video model; again is nothing to do, another GPU replaces."""
    root = Path(shutil.copytree(builtin_bundle("tiny-i2v"), tmp_path / "bundle"))
    bundle = wanx.build(root, target="rtx:sm89,sm120")
    assert bundle.manifest.target == "rtx"
    for name, component in bundle.manifest.components.items():
        schedule = read_schedule(root / component.engines["rtx"])
        assert schedule.device == "sm89+sm120"
        assert schedule.compiler == f"tensorrt_rtx {trt.__version__}"
        inputs = {n for step in schedule.steps for n in step.inputs}
        assert set(component.inputs) <= inputs, name
        assert schedule.input_dtypes.keys() == set(component.inputs)
    assert {c.problem for c in verify_bundle(read_bundle(root))} == {None}

    def build(builder: TensorRTBuilder, *_: Any) -> None:
        built.append(builder)
        raise WanxError("stop")

    built: list[TensorRTBuilder] = []
    monkeypatch.setattr(TensorRTBuilder, "build", build)
    assert wanx.build(root, target="rtx:sm120,sm89").hash == bundle.hash
    assert not built
    with pytest.raises(WanxError, match="stop"):
        wanx.build(root, target="rtx:sm120")
    options = {"sizes": [(48, 80)], "frames": 5, "plugins": "GeluQuantize"}
    with pytest.raises(WanxError, match="stop"):
        wanx.build(root, target="rtx:sm89", **options, workspace=1 << 28, opt_level=1)
    default, asked = built
    assert (default.plugins, default.options) == ((), DEFAULT_OPTIONS)
    assert asked.ranges["L"] == Range(min=1, opt=2 * 3 * 5, max=2 * 3 * 5)
    assert asked.plugins == ("GeluQuantize",)
    assert (asked.options.workspace, asked.options.opt_level) == (1 << 28, 1)
    assert open_bundle(root).hash == bundle.hash
    assert wanx.build(root, target="cpu").manifest.target == "cpu"


def test_attention_that_is_taken_apart_is_refused() -> None:
    parts = partition(spec_of(WIDE, "attention"), torch.bfloat16)
    # From one token on; few at most, since it would hold all of their scores.
    sizes = {**ranges(PRESETS["t2v-1.3B"]), "L": Range(min=1, opt=512, max=1024)}
    segment = parts.segments["block"]
    _, layers = layers_of(segment, parts.axes, (89,), sizes)
    with pytest.raises(WanxError, match="did not become one kernel"):
        target.require_layers(segment, layers)


def build_with_worker(second: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> EngineSchedule:
    """Build with a worker that does something else instead of its second engine."""
    script = folder / "worker_that_ends.py"
    script.write_text(
        "import errno, json, os, sys\n"
        "from pathlib import Path\n"
        "from wanx.exporter.targets.tensorrt import worker\n"
        "whole, calls = worker.build_engine, []\n"
        "def build(*arguments):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 2:\n"
        f"        {second}\n"
        "    return whole(*arguments)\n"
        "worker.build_engine = build\n"
        "worker.main()\n"
    )
    monkeypatch.setattr(target.worker, "__name__", "worker_that_ends")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    builder = TensorRTBuilder(
        target=gpus.TensorRTTarget(name="rtx", sms=(89,)), ranges=ranges(PRESETS["tiny"])
    )
    parts = partition(dit_spec(PRESETS["tiny"].dit), torch.bfloat16)
    return builder.build("dit", parts, folder / "engines")


def test_a_process_that_ends_is_told_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the parser aborts."""
    words = r"cannot build block of dit: TensorRT ended its process \(signal SIGABRT: last words\)"
    second = "print('last words', file=sys.stderr, flush=True); os.abort()"
    with pytest.raises(WanxError, match=words):
        build_with_worker(second, tmp_path, monkeypatch)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """The process passes it on; what publishes the bundle makes a line of it."""
    with pytest.raises(OSError, match="engines") as caught:
        build_with_worker(f"raise OSError({code}, 'full')", tmp_path, monkeypatch)
    assert caught.value.errno == code


def test_what_tensorrt_does_not_read() -> None:
    with pytest.raises(WanxError, match="TensorRT does not read its graph: "):
        build_engine(trt, b"no graph", {}, (89,))


def test_products_that_are_not_8_bit_are_refused() -> None:
    segment = partition(spec_of(SMALL, "fp8"), torch.float32).segments["block"]
    with pytest.raises(WanxError, match="2 of 8 FP8 layers became FP8 products"):
        target.require_layers(segment, {"gemm BFloat16": 6, "gemm FP8": 2})


@pytest.mark.parametrize(
    ("target", "sms", "device"),
    [
        ("rtx", (), ""),
        ("rtx:sm89", (89,), "sm89"),
        ("rtx:sm120,sm89,sm120", (89, 120), "sm89+sm120"),
        ("tensorrt", (), ""),
        ("tensorrt:sm80+", (80,), "sm80+"),
    ],
)
def test_targets(target: str, sms: tuple[int, ...], device: str) -> None:
    parsed = gpus.parse_target(target)
    assert parsed is not None
    assert (parsed.sms, parsed.device) == (sms, device)


def test_the_gpu_that_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full TensorRT builds with the kernels of its own GPU, which have to run on older ones too."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    built = {
        target: gpus.for_this_machine(parsed).device
        for target in ("rtx", "rtx:sm120", "tensorrt", "tensorrt:sm80+")
        if (parsed := gpus.parse_target(target)) is not None
    }
    assert built == {
        "rtx": "sm90", "rtx:sm120": "sm120", "tensorrt": "sm90", "tensorrt:sm80+": "sm80+"
    }  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(UsageError, match=r"a GPU of sm80\+ has to build for it, .* is sm75"):
        gpus.for_this_machine(AMPERE_PLUS)


def test_gpus_of_the_builder() -> None:
    """What full TensorRT, which RTX takes no level from, is told; what comes of it needs a GPU."""
    full = SimpleNamespace(hardware_compatibility_level=None)
    choose_gpus(trt, full, (90,), ampere_plus=False)
    assert full.hardware_compatibility_level is None
    choose_gpus(trt, full, (80,), ampere_plus=True)
    assert full.hardware_compatibility_level == trt.HardwareCompatibilityLevel.AMPERE_PLUS
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    config = builder.create_builder_config()
    choose_gpus(trt, config, (89, 120), ampere_plus=False)
    capabilities = [config.get_compute_capability(place) for place in range(2)]
    assert capabilities == [trt.ComputeCapability.SM89, trt.ComputeCapability.SM120]


@pytest.mark.parametrize("target", ["cpu", "aoti", "rt", "rtxx:sm89"])
def test_other_targets(target: str) -> None:
    assert gpus.parse_target(target) is None


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (
            lambda: gpus.parse_target("rtx:sm90"),
            "does not build for sm90; choose from sm75,",
        ),
        (lambda: gpus.parse_target("tensorrt:sm89"), "follows, or write tensorrt:sm80.+ for"),
        (lambda: gpus.for_this_machine(AMPERE_PLUS), "for this machine's GPU, and PyTorch finds"),
        (
            lambda: gpus.require_precision(AMPERE_PLUS, "fp8"),
            "sm80 has no FP8; choose --precision int8, or sm89 or newer",
        ),
        (
            lambda: gpus.require_plugins(AMPERE_PLUS, ("GeluQuantize",)),
            "plug-ins hold kernels for GPUs by name; leave --plugins out, or sm80.+",
        ),
        (
            lambda: gpus.require_precision(gpus.TensorRTTarget(name="rtx", sms=(86,)), "fp8"),
            "sm86 has no FP8; choose --precision int8, or sm89 or newer",
        ),
        (
            lambda: gpus.require_precision(gpus.TensorRTTarget(name="rtx", sms=(75,)), "bf16"),
            "sm75 has no bf16, which engines compute in; choose sm80 or newer",
        ),
        (
            lambda: gpus.for_this_machine(gpus.TensorRTTarget(name="rtx")),
            "PyTorch finds none; name one, as in rtx:sm89",
        ),
    ],
)
def test_what_cannot_be_built(
    act: Callable[[], object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=words):
        act()


def test_sizes_that_are_covered() -> None:
    config = PRESETS["t2v-14B"]
    every = ranges(config)
    # 81 frames are 21 latent ones; a token is 16 pixels wide and high.
    assert every["L"].max == 21 * 45 * 80
    assert (every["h"].max, every["w"].max) == (160, 160)
    asked = ranges(config, sizes=[(832, 480), (480, 1280)], frames=17, fp8_attention=True)
    assert asked["L"] == Range(min=32, opt=5 * 30 * 52, max=5 * 80 * 30)
    assert asked["h"] == Range(min=1, opt=60, max=160)
    assert asked["w"] == Range(min=1, opt=104, max=104)
    assert asked["B"] == Range(min=1, opt=1, max=2)
    with pytest.raises(UsageError, match="--frames 0: a video has 1 or more"):
        ranges(config, frames=0)
    with pytest.raises(UsageError, match="--sizes 832x8: sides are 16 pixels or more"):
        ranges(config, sizes=[(1280, 720), (832, 8)])


@pytest.mark.parametrize(
    ("asked", "names"),
    [("auto", ()), ("none", ()), ("RMSNormRope,GeluQuantize", ("RMSNormRope", "GeluQuantize"))],
)
def test_plug_ins(asked: str, names: tuple[str, ...]) -> None:
    assert gpus.parse_plugins(asked) == names


@pytest.mark.parametrize("asked", ["RMSNorm", "", "RMSNormRope,"])
def test_plug_ins_that_there_are_not(asked: str) -> None:
    with pytest.raises(UsageError, match=r"choose auto, none, or from .*RMSNormRope,"):
        gpus.parse_plugins(asked)
