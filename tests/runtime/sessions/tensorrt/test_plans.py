"""The plans that building makes, run by the session with ONNX Runtime in the place of TensorRT."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from tests.support.fake_gpu import FakeCuda, FakeTensorRT, Function, engine_file
from wanx.builtin import builtin_bundle
from wanx.bundle.engine_schedule import SCHEDULE, EngineSchedule, Program
from wanx.bundle.reader import Bundle, open_bundle
from wanx.exporter.components import GraphInput, component_specs
from wanx.exporter.partition.partition import partition
from wanx.exporter.partition.segments import STORED, Segment
from wanx.exporter.targets.tensorrt.graph import segment_graph
from wanx.runtime.pipeline import Pipeline
from wanx.runtime.sessions import open_session
from wanx.runtime.sessions.tensorrt.session import TensorRTSession

PROMPT = "a red circle moving right on a blue background"
BATCH_LIMIT = 1000


def shapes_of(item: GraphInput) -> list[list[int]]:
    least = [1 if isinstance(size, str) else size for size in item.shape]
    return [least, [1 << 20 if isinstance(size, str) else size for size in item.shape]]


def write_engine(path: Path, key: str, segment: Segment) -> None:
    inputs: dict[str, Any] = {}
    for item in segment.inputs:
        inputs[item.name] = "I64" if item.dtype == torch.int64 else "F32", shapes_of(item)
    for name, parameter in segment.parameters:
        inputs[f"weight.{name}"] = STORED[parameter.dtype], 2 * [list(parameter.shape)]
    engine_file(path, key, inputs, dict.fromkeys(segment.outputs, "F32"))


def function_of(segment: Segment, axes: dict[str, int]) -> Function:
    session = onnxruntime.InferenceSession(
        segment_graph(segment, axes).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_inputs()]

    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        return list(session.run(None, dict(zip(names, arrays, strict=True))))

    return run


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, dict[str, Function]]:
    """The built-in model in fp32, cut as for TensorRT, and what computes each engine."""
    root = tmp_path_factory.mktemp("plans") / "bundle"
    shutil.copytree(builtin_bundle(), root)
    bundle = open_bundle(root, verify="size")
    functions: dict[str, Function] = {}
    components = dict(bundle.manifest.components)
    for spec in component_specs(bundle.manifest.config):
        parts = partition(spec, torch.float32)
        folder = root / "engines" / "fake" / spec.name
        folder.mkdir(parents=True)
        programs = {}
        for name, segment in parts.segments.items():
            key = f"{spec.name}.{name}"
            functions[key] = function_of(segment, parts.axes)
            write_engine(folder / f"{name}.engine", key, segment)
            programs[name] = Program(file=f"{name}.engine", weights=segment.weights)
        schedule = EngineSchedule(
            compiler="tensorrt 99.0", device="sm89", input_dtypes=parts.input_dtypes,
            batched=parts.batched,
            max_batched_tokens=BATCH_LIMIT, programs=programs, steps=parts.steps,
        )  # fmt: skip
        (folder / SCHEDULE).write_text(schedule.to_json())
        engines = {"tensorrt": f"engines/fake/{spec.name}/{SCHEDULE}"}
        components[spec.name] = components[spec.name].model_copy(update={"engines": engines})
    manifest = bundle.manifest.model_copy(update={"target": "tensorrt", "components": components})
    return dataclasses.replace(bundle, manifest=manifest), functions


@pytest.fixture
def cuda(
    planned: tuple[Bundle, dict[str, Function]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeCuda]:
    fake = FakeCuda()
    trt = FakeTensorRT(fake, planned[1])
    monkeypatch.setattr("wanx.runtime.sessions.device.cuda.RESERVED_BYTES", 0)
    monkeypatch.setenv("WANX_TRUST_ENGINES", "1")
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(
        "wanx.runtime.sessions.tensorrt.session.import_tensorrt", lambda _, **__: trt
    )
    monkeypatch.setattr(
        "wanx.runtime.sessions.tensorrt.loader.register", lambda _: SimpleNamespace(problem=None)
    )
    yield fake
    assert fake.device.live == {}
    assert fake.host.live == {}
    assert fake.open == set()


def test_a_whole_video(planned: tuple[Bundle, dict[str, Function]], cuda: FakeCuda) -> None:
    """Text, branches as a batch, recorded steps, and state from decoder to decoder."""
    bundle, _ = planned
    with open_session(bundle, "dit") as session:
        assert isinstance(session, TensorRTSession)
    manifest = bundle.manifest.model_copy(update={"target": "cpu"})
    videos = [
        Pipeline(each)(PROMPT, seed=3, steps=5, width=64, height=64, frames=9).frames
        for each in (bundle, dataclasses.replace(bundle, manifest=manifest))
    ]
    assert cuda.calls.count("cudaGraphLaunch") == 3
    difference = np.abs(videos[0].astype(int) - videos[1].astype(int))
    assert difference.max() <= 1
