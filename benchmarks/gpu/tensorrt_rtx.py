"""Question to TensorRT-RTX: does it build for this GPU, whether it names it or not (SM90, say)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec

from benchmarks.gpu.context import BenchContext
from benchmarks.gpu.report import Measurement, ReportItem

SECONDS = 60.0
# A network of one product, built for whatever GPU is there.
PROGRAM = """
from wanx.runtime.sessions.tensorrt.library import import_tensorrt
trt = import_tensorrt("tensorrt_rtx")
class Log(trt.ILogger):
    def log(self, severity, message):
        if severity <= trt.ILogger.ERROR:
            print(message)
log = Log()
builder = trt.Builder(log)
network = builder.create_network(0)
x = network.add_input("x", trt.float32, (64, 64))
y = network.add_matrix_multiply(x, trt.MatrixOperation.NONE, x, trt.MatrixOperation.NONE)
network.mark_output(y.get_output(0))
plan = builder.build_serialized_network(network, builder.create_builder_config())
if plan is None:
    print("it builds no engine")
else:
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    print("it builds an engine, and", "loads it" if engine else "cannot load it")
"""


def tensorrt_rtx(bench: BenchContext) -> Iterator[ReportItem]:
    """Build and load an engine in a process of its own, where TensorRT-RTX is installed."""
    name = {"operation": "engine of one product", "implementation": "TensorRT-RTX"}
    if find_spec("tensorrt_rtx") is None:
        yield Measurement(**name, error="tensorrt_rtx is not installed")  # type: ignore[arg-type]
        return
    limit = max(min(SECONDS, bench.left()), 0)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=limit, check=False
    )
    answer = (done.stdout + done.stderr).strip().splitlines() or ["nothing"]
    yield Measurement(**name, details={"answer": answer[-1]})  # type: ignore[arg-type]
