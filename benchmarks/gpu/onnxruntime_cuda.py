"""The built-in model on ONNX Runtime's CUDA provider, each component against the processor."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import wanx
from benchmarks.components import AXES, random_feeds
from benchmarks.gpu.context import BenchContext
from benchmarks.gpu.report import Goal, Measurement, ReportItem, Times
from wanx.accuracy.metrics import cosine
from wanx.errors import WanxError
from wanx.runtime.sessions import open_session
from wanx.runtime.sessions.engine_session import RUNS_BEFORE_CAPTURE
from wanx.runtime.sessions.onnxruntime.providers import PROVIDERS
from wanx.runtime.sessions.onnxruntime.session import OnnxRuntimeSession

ROUNDS = RUNS_BEFORE_CAPTURE + 4  # the first ones load kernels, and make the denoiser's CUDA graph


def onnxruntime_cuda(
    bench: BenchContext, source: str = "tiny", provider: str = "cuda"
) -> Iterator[ReportItem]:
    """Export the model in bf16 for the provider, and run each component on random inputs."""
    row = PROVIDERS[provider]
    if not row.is_installed:
        yield Measurement(
            operation="components", implementation=provider, error=f"{row.package} is not installed"
        )
        return
    folder = bench.folder / f"{source}-{provider}"
    bundle = wanx.export(source, folder, precision="bf16", target=provider, force=True)
    worst = 1.0
    for name in bundle.manifest.components:
        try:
            with open_session(bundle, name, provider="cpu") as session:
                assert isinstance(session, OnnxRuntimeSession)
                feeds = random_feeds(session.graph_inputs(), AXES | {"n": 16, "L": 256})
                expected = session.run(feeds)
            with open_session(bundle, name, provider=provider) as session:
                assert isinstance(session, OnnxRuntimeSession)
                left, total = session.nodes_left()
                seconds, results = [], {}
                for _ in range(ROUNDS):
                    start = time.perf_counter()
                    results = session.run(feeds)
                    seconds.append(time.perf_counter() - start)
        except WanxError as error:
            worst = -1.0
            yield Measurement(operation=name, implementation=provider, error=str(error))
            continue
        # A state before the first frame is nothing but zeros.
        found = [cosine(results[key], value) for key, value in expected.items() if value.any()]
        agreement = min((c if math.isfinite(c) else -1.0 for c in found), default=1.0)
        worst = min(worst, agreement)
        yield Measurement(
            operation=name,
            implementation=provider,
            times=Times(seconds=tuple(seconds[RUNS_BEFORE_CAPTURE + 1 :])),
            numerics={"cosine": agreement},
            details={"nodes": total, "nodes on the processor": dict(left)},
        )
    yield Goal.at_least(
        "components as the processor computes them, by their cosine 0.99", worst, 0.99
    )
