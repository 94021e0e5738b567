"""What the device can do at most: matrix products and copies of its own libraries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from wanx.benchmarks.gpu.bench import Bench, nothing
from wanx.benchmarks.gpu.report import Found, Row
from wanx.benchmarks.gpu.rounds import Call, take_turns

BF16, FP8, INT8, COPY = "bf16 GEMM", "fp8 GEMM", "int8 GEMM", "copy"
EXACT_FP8 = "fp8 GEMM, sums in fp32"


def ceilings(bench: Bench) -> Iterator[Found]:
    """Products of square matrices, and a copy, whose bytes count when read and when written."""
    n = bench.gemm
    e4m3 = torch.float8_e4m3fn
    a, b = (bench.random(n, n, dtype=torch.bfloat16) for _ in range(2))
    a8, b8 = a.to(e4m3), b.to(e4m3)
    a_int, b_int = (bench.random(n, n, dtype=torch.int8) for _ in range(2))
    one = torch.ones((), device=bench.device)
    source = bench.random(bench.copied // 2, dtype=torch.bfloat16)
    target = torch.empty_like(source)

    def fp8(fast: bool) -> Call:
        def call() -> object:
            return torch._scaled_mm(
                a8, b8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=fast
            )

        return call

    calls: dict[str, Call] = {
        BF16: lambda: a @ b.t(),
        FP8: fp8(True),
        EXACT_FP8: fp8(False),
        INT8: lambda: torch._int_mm(a_int, b_int.t()),
        COPY: lambda: target.copy_(source),
    }
    errors = {name: bench.attempt(name, call, nothing).error for name, call in calls.items()}
    times = take_turns(bench, {n: c for n, c in calls.items() if errors[n] is None}, short=True)
    for name in calls:
        if name not in times:
            yield Row(what=name, by="torch", error=errors[name])
            continue
        work = 2.0 * bench.copied if name == COPY else 2.0 * n**3
        rate = work / times[name].median
        bench.ceilings[name] = rate
        unit = "B/s" if name == COPY else "FLOP/s"
        shape = {"bytes": bench.copied} if name == COPY else {"n": n}
        yield Row(what=name, by="torch", shape=shape, times=times[name], rate=rate, unit=unit)


def recall(bench: Bench, rows: list[dict[str, Any]]) -> None:
    """Take the ceilings from what a process before this one measured."""
    bench.ceilings |= {row["what"]: row["rate"] for row in rows if "rate" in row}
