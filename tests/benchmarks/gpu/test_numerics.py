"""Every kernel is held against its reference, and what is wrong shows."""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import wanx.kernels
from benchmarks.gpu import kernel_cases
from benchmarks.gpu.numerics import numerics
from benchmarks.gpu.onnxruntime_cuda import onnxruntime_cuda
from benchmarks.gpu.tensorrt_rtx import PROGRAM, tensorrt_rtx
from benchmarks.gpu.tuning import tuning
from tests.support.gpu_bench import MODEL, item, run_items, run_one, tiny_bench
from wanx.builtin import open_named
from wanx.kernels.registry import NODES
from wanx.runtime.sessions.onnxruntime.providers import PROVIDERS

# The same kernel as its neighbour, with another type of result.
SAME = {"adaln_to": "adaln"}


def test_every_op_is_among_them(tmp_path: Path) -> None:
    for module in pkgutil.walk_packages(wanx.kernels.__path__, "wanx.kernels."):
        importlib.import_module(module.name)
    ops = {str(op).split(".")[1] for op in NODES}
    record = run_one(tiny_bench(tmp_path), lambda bench: numerics(bench, MODEL, 17))
    measured = {row["what"].partition(",")[0] for row in record["rows"]}
    assert {SAME.get(op, op) for op in ops} <= measured
    assert all(row["within"] for row in record["rows"]), record
    assert record["goals"][0]["met"] is True


@pytest.mark.parametrize("error", [0.05, torch.nan])
def test_a_wrong_kernel_is_found(
    error: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = kernel_cases.gated_residual

    def wrong(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        result = right(x, y, gate)
        result[0, -1] += 10 * error  # one row of seventeen
        return result

    monkeypatch.setattr(kernel_cases, "gated_residual", wrong)
    record = run_one(tiny_bench(tmp_path), lambda bench: numerics(bench, MODEL, 17))
    assert [row["what"] for row in record["rows"] if not row["within"]] == ["gated_residual"]
    assert (record["goals"][0]["value"], record["goals"][0]["met"]) == (1, False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_needs_a_gpu_says_so(tmp_path: Path) -> None:
    report, _ = run_items(tiny_bench(tmp_path), item("tune", lambda bench: tuning(bench, "adaln")))
    assert report.items[0]["status"] == "failed"
    assert "needs an NVIDIA GPU" in report.items[0]["reason"]


def test_the_question_to_tensorrt_is_asked_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile(PROGRAM, "<rtx>", "exec")
    monkeypatch.setattr("benchmarks.gpu.tensorrt_rtx.find_spec", lambda name: None)
    record = run_one(tiny_bench(tmp_path), tensorrt_rtx)
    assert record["rows"][0]["error"] == "tensorrt_rtx is not installed"
    monkeypatch.setattr("benchmarks.gpu.tensorrt_rtx.find_spec", lambda name: name)
    monkeypatch.setattr("benchmarks.gpu.tensorrt_rtx.PROGRAM", "print('log'); print('it builds')")
    record = run_one(tiny_bench(tmp_path), tensorrt_rtx)
    assert record["rows"][0]["answer"] == "it builds"


@pytest.mark.skipif(PROVIDERS["cuda"].is_installed, reason="it is installed")
def test_the_provider_for_cuda_is_measured_where_it_is_installed(tmp_path: Path) -> None:
    record = run_one(tiny_bench(tmp_path), onnxruntime_cuda)
    assert (
        record["rows"][0]["error"] == "onnxruntime-gpu in the place of onnxruntime is not installed"
    )


def test_a_provider_is_held_against_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = run_one(
        tiny_bench(tmp_path), lambda bench: onnxruntime_cuda(bench, "tiny", "openvino")
    )
    components = open_named("tiny").manifest.components
    assert [row["what"] for row in record["rows"]] == list(components)
    assert all(row["numerics"]["cosine"] > 0.999 for row in record["rows"])
    assert record["goals"][0]["met"] is True
    wrong = np.full((2, 3), np.nan, np.float32)
    with monkeypatch.context() as patch:
        patch.setattr("benchmarks.gpu.onnxruntime_cuda.cosine", lambda a, b: float(wrong.mean()))
        record = run_one(
            tiny_bench(tmp_path), lambda bench: onnxruntime_cuda(bench, "tiny", "openvino")
        )
    assert record["goals"][0]["met"] is False
    monkeypatch.setenv("WANX_STRICT", "1")
    monkeypatch.setattr(
        "wanx.runtime.sessions.onnxruntime.assignment.nodes_left",
        lambda session: (Counter(Conv=1), 2),
    )
    record = run_one(
        tiny_bench(tmp_path), lambda bench: onnxruntime_cuda(bench, "tiny", "openvino")
    )
    assert "leaves 1 of 2 nodes" in record["rows"][0]["error"]
    assert record["goals"][0]["met"] is False
