"""Attention by every implementation that runs here, on q, k and v of one length."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.context import BenchContext, FirstRun
from benchmarks.gpu.distances import cosine
from benchmarks.gpu.report import Goal, Measurement, ReportItem, Times
from benchmarks.gpu.sizes import Model, Size
from benchmarks.gpu.timing import Call, time_interleaved
from wanx.benchmarks.speed.roofline.gpu_peaks import BF16, FP8
from wanx.kernels.attention.backends import BACKENDS, AttentionBackend

OURS = "triton"
PROBES = 128  # rows whose right answer is computed


def attention(bench: BenchContext, model: Model, size: Size) -> Iterator[ReportItem]:
    """Measure all implementations; those that cannot run say why."""
    config, tokens = model.config, size.tokens
    heads, scale = config.num_heads, config.head_dim**-0.5
    q, k, v = (bench.random(1, tokens, config.dim, dtype=torch.bfloat16) for _ in range(3))
    # The last rows are among them: lengths are no multiples of the blocks of a kernel.
    probes = torch.linspace(0, tokens - 1, min(PROBES, tokens), device=bench.device).round().long()
    right = _exact(q[:, probes], k, v, heads, scale)

    def check(out: Tensor) -> dict[str, float]:
        candidate = out[:, probes].float()
        rows = torch.nn.functional.cosine_similarity(candidate, right, dim=-1)
        return {"cosine": cosine(candidate, right), "worst_row": float(rows.min())}

    first_runs: dict[str, FirstRun] = {}
    calls: dict[str, Call] = {}
    for name, provider in BACKENDS.items():
        reason = provider.unsupported_reason(q, k, v, heads)
        if reason is not None:
            first_runs[name] = FirstRun(error=reason)
            continue
        call = partial(provider.run, q, k, v, heads, scale)
        first_runs[name] = bench.first_run(name, call, check)
        if first_runs[name].error is None:
            calls[name] = call
    times = time_interleaved(bench, calls)
    yield from rows(bench, first_runs, times, heads, tokens, config.head_dim)
    yield from goals(first_runs, times)


def rows(
    bench: BenchContext,
    first_runs: dict[str, FirstRun],
    times: dict[str, Times],
    heads: int,
    tokens: int,
    head_dim: int,
) -> Iterator[Measurement]:
    """A line for each provider."""
    shape = {"L": tokens, "heads": heads}
    best = _fastest(times, 16)
    for name, first_run in first_runs.items():
        backend = BACKENDS[name]
        operation = f"attention, {backend.bits} bits"
        if name not in times:
            yield Measurement(
                operation=operation, implementation=name, shape=shape, error=first_run.error
            )
            continue
        of = BF16 if backend.bits == 16 else FP8
        speedup = {}
        if best is not None and name != best:
            speedup = {best: times[best].median / times[name].median}
        yield Measurement(
            operation=operation,
            implementation=name,
            shape=shape,
            times=times[name],
            rate=4.0 * tokens**2 * head_dim * heads / times[name].median,
            peak=of,
            ceiling=bench.ceilings.get(of),
            speedup=speedup,
            numerics=first_run.numerics,
        )


def goals(first_runs: dict[str, FirstRun], times: dict[str, Times]) -> Iterator[Goal]:
    """Goals of the kernels."""
    best, narrow = _fastest(times, 16), _fastest(times, 8)

    def ratio(name: str | None) -> float | None:
        if best is None or name not in times:
            return None
        return times[best].median / times[name].median

    yield Goal.at_least("ours in bf16 at 0.9 of the fastest of 16 bits", ratio(OURS), 0.9)
    yield Goal.at_least("the fastest of 8 bits 1.4 times as fast as that", ratio(narrow), 1.4)
    accuracy = None if narrow is None else first_runs[narrow].numerics["cosine"]
    yield Goal.at_least("its cosine with the exact result 0.999", accuracy, 0.999)


def _fastest(times: dict[str, Times], bits: int) -> str | None:
    known: dict[str, AttentionBackend] = BACKENDS
    names = [name for name in times if known[name].bits == bits]
    return min(names, key=lambda name: times[name].median, default=None)


def _exact(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float) -> Tensor:
    """Attention of a few queries in fp64, one head at a time; returned in fp32."""
    parts = (t[0].view(t.shape[1], heads, -1).transpose(0, 1) for t in (q, k, v))
    out = [
        torch.softmax(queries.double() @ keys.double().T * scale, -1) @ values.double()
        for queries, keys, values in zip(*parts, strict=True)
    ]
    return torch.stack(out).transpose(0, 1).flatten(1)[None].float()
