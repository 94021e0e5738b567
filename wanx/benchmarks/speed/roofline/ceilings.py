"""Ceilings of this machine: large matrix products and copies, measured.

On the processor the products are those of ONNX Runtime, which is what runs the graphs there: fp32,
and int8 in the form that quantised graphs have. On a GPU they are those of PyTorch.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

_SHAPES = ((1024, 1536, 1536), (1024, 1536, 8960), (512, 4096, 4096))
_COPIED = 256 << 20  # bytes, far more than any cache
_LEAST_SECONDS = 0.15


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """The best rates that were seen.

    Attributes:
        flops: operations per second of a large product, by type: ``high`` is what the target
            computes in where nothing is quantised.
        high: the name of that type.
        bytes: per second of a copy, each byte counted when it is read and when it is written.
    """

    flops: Mapping[str, float]
    high: str
    bytes: float

    def seconds(self, flops: Mapping[str, float], moved: float) -> float:
        """The least time for operations by type and bytes, whichever takes longer."""
        return max(self.compute_seconds(flops), moved / self.bytes)

    def compute_seconds(self, flops: Mapping[str, float]) -> float:
        """The least time for operations; types without a rate of their own run in ``high``."""
        return sum(n / self.flops.get(kind, self.flops["high"]) for kind, n in flops.items())


def processor_ceilings(threads: int | None = None) -> Ceilings:
    """Measure the processor; takes some seconds."""
    return Ceilings(
        flops={"high": _product("fp32", threads), "int8": _product("int8", threads)},
        high="fp32",
        bytes=_copy(threads),
    )


def gpu_ceilings() -> Ceilings | None:
    """Measure the GPU with PyTorch; None without either."""
    if find_spec("torch") is None:
        return None
    from wanx.benchmarks.speed.roofline.gpu_peaks import gpu_peaks

    rates = gpu_peaks()
    return None if rates is None else Ceilings(flops=rates[0], high="bf16", bytes=rates[1])


def _product(kind: str, threads: int | None) -> float:
    best = 0.0
    for m, k, n in _SHAPES:
        call = _int8_call(m, k, n, threads) if kind == "int8" else _fp32_call(m, k, n, threads)
        best = max(best, 2.0 * m * k * n / _fastest(call))
    return best


def _fp32_call(m: int, k: int, n: int, threads: int | None) -> Callable[[], object]:
    draw = np.random.default_rng(0)
    a, b = (draw.standard_normal(shape, np.float32) for shape in ((m, k), (k, n)))
    return _graph_call("MatMul", "", {"a": a}, {"b": b}, threads)


def _int8_call(m: int, k: int, n: int, threads: int | None) -> Callable[[], object]:
    draw = np.random.default_rng(0)
    # Inputs with an offset of 128, as in the graphs of bundles: those have the fast kernels.
    a = draw.integers(0, 256, (m, k), np.uint8)
    weights = {
        "b": draw.integers(-127, 128, (k, n), np.int8),
        "a_scale": np.float32(0.01),
        "b_scale": np.full(n, 0.01, np.float32),
        "a_zero": np.uint8(128),
    }
    return _graph_call("MatMulIntegerToFloat", "com.microsoft", {"a": a}, weights, threads)


def _graph_call(
    operation: str,
    domain: str,
    feeds: Mapping[str, Any],
    weights: Mapping[str, Any],
    threads: int | None,
) -> Callable[[], object]:
    """A graph of one node, whose weights are prepared once as those of a bundle are."""
    import onnx
    from onnx import helper, numpy_helper

    from wanx.runtime.sessions.onnxruntime.loading import create_session

    inputs = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
        )
        for name, value in feeds.items()
    ]
    graph = helper.make_graph(
        [helper.make_node(operation, [*feeds, *weights], ["y"], domain=domain)],
        "product",
        inputs,
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "product.onnx")
        onnx.save(model, path)
        session = create_session(path, path.parent, threads=threads)
    return lambda: session.run(None, dict(feeds))


def _copy(threads: int | None) -> float:
    count = threads or os.cpu_count() or 1
    source = np.ones(_COPIED, np.uint8)
    target = np.zeros_like(source)
    parts = [
        (target[i * _COPIED // count : (i + 1) * _COPIED // count],
         source[i * _COPIED // count : (i + 1) * _COPIED // count])
        for i in range(count)
    ]  # fmt: skip
    with ThreadPoolExecutor(count) as pool:
        taken = _fastest(lambda: list(pool.map(lambda part: np.copyto(*part), parts)))
    return 2.0 * _COPIED / taken


def _fastest(call: Callable[[], object]) -> float:
    """Seconds of the fastest of some calls, after one that warms up."""
    call()
    best, spent = float("inf"), 0.0
    while spent < _LEAST_SECONDS or best == float("inf"):
        start = time.perf_counter()
        call()
        taken = time.perf_counter() - start
        best, spent = min(best, taken), spent + taken
    return best
