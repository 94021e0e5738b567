"""Ceilings, kernels, attention, linears and a generation of the GPU benchmark, on the processor."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import attention, generation, kernels, linears, programs
from benchmarks.gpu.catalog import FAMILIES
from benchmarks.gpu.ceilings import ceilings, recall
from benchmarks.gpu.context import BenchContext
from benchmarks.gpu.distances import cosine, differences
from benchmarks.gpu.kernel_cases import families
from benchmarks.gpu.sizes import MODELS, SIZES, step_flops
from tests.support.gpu_bench import CONFIG, MODEL, SIZE, run_one, tiny_bench
from wanx.benchmarks.speed.roofline.gpu_peaks import COPY, EXACT_FP8, FP8
from wanx.builtin import builtin_bundle
from wanx.errors import EnvironmentMismatchError
from wanx.exporter.partition.segments import Partition
from wanx.kernels.attention.backends import AttentionBackend
from wanx.kernels.attention.op import attention_reference


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other are most of the time of tensors this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def bench(tmp_path: Path) -> BenchContext:
    torch.manual_seed(3)
    return tiny_bench(tmp_path)


def test_work_is_what_the_literature_says() -> None:
    model = {model.name: model.config for model in MODELS}["14B"]
    short, long = (step_flops(model, size.tokens) / 1e15 for size in SIZES)
    assert [size.tokens for size in SIZES] == [32760, 75600]
    assert (short, long) == pytest.approx((3.36, 13.05), rel=0.01)


def test_ceilings(bench: BenchContext) -> None:
    record = run_one(bench, ceilings)
    rows = {row["what"]: row for row in record["rows"]}
    assert len(rows) == 5
    for row in rows.values():
        work = 2 * 4096 if row["what"] == COPY else 2 * 64**3
        assert row["rate"] == pytest.approx(1e3 * work / row["ms"])
        assert row["unit"] == ("B/s" if row["what"] == COPY else "FLOP/s")
    other = tiny_bench(bench.folder)
    recall(other, record["rows"])
    assert other.ceilings == bench.ceilings


def test_a_product_that_fails_is_no_ceiling(
    bench: BenchContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, use_fast_accum: bool, **__: object) -> Tensor:
        raise RuntimeError("no fp8 here")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    record = run_one(bench, ceilings)
    errors = {row["what"] for row in record["rows"] if "error" in row}
    assert errors == {FP8, EXACT_FP8}
    assert FP8 not in bench.ceilings


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels(bench: BenchContext, family: str) -> None:
    bench.ceilings[COPY] = 1.0
    record = run_one(bench, partial(kernels.kernels, model=MODEL, family=family))
    cases = families(bench, CONFIG, SIZE.tokens)
    assert tuple(cases) == FAMILIES
    assert [row["what"] for row in record["rows"][::2]] == [case.name for case in cases[family]]
    for ours, eager in zip(record["rows"][::2], record["rows"][1::2], strict=True):
        assert (ours["by"], eager["by"]) == ("wanx", "torch")
        for row in (ours, eager):
            # The op runs its reference here, so nothing but rounding is left.
            assert row["numerics"]["cosine"] > 0.9999
            assert row["numerics"]["max_error"] < 0.08
        assert ours["speedup"]["torch"] == pytest.approx(eager["ms"] / ours["ms"])
        assert ours["of_ceiling"] == ours["rate"]
        assert "speedup" not in eager
    (goal,) = record["goals"]
    assert goal["met"] is True
    assert goal["value"] == min(row["rate"] for row in record["rows"][::2])


def test_bytes_are_counted_once_read_and_once_written(bench: BenchContext) -> None:
    record = run_one(bench, partial(kernels.kernels, model=MODEL, family="gated_residual"))
    row = record["rows"][0]
    tokens, dim = SIZE.tokens, CONFIG.dim
    moved = (4 + 2 + 4) * tokens * dim + 4 * dim
    assert row["rate"] == pytest.approx(1e3 * moved / row["ms"])
    assert row["shape"] == {"D": dim, "L": tokens}


def test_a_kernel_that_fails_leaves_the_others(
    bench: BenchContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.crashed = {f"one/adaln_quantize, fp8, {SIZE.tokens}, wanx": "the process was lost"}
    record = run_one(bench, partial(kernels.kernels, model=MODEL, family="adaln"))
    errors = [(row["what"], row["by"]) for row in record["rows"] if "error" in row]
    assert errors == [("adaln_quantize, fp8", "wanx")]
    assert record["goals"][0]["met"] is False


def test_a_reference_is_compiled_too(bench: BenchContext) -> None:
    bench.compiles = True
    record = run_one(bench, partial(kernels.kernels, model=MODEL, family="gated_residual"))
    assert [row["by"] for row in record["rows"]] == ["wanx", "torch", "torch.compile"]
    assert all("error" not in row for row in record["rows"]), record
    assert record["rows"][0]["speedup"].keys() == {"torch", "torch.compile"}


def provider(
    name: str, bits: int, reason: str | None = None, noise: float = 0.0
) -> AttentionBackend:
    def run(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
        out = attention_reference(q, k, v, None, num_heads, scale)
        return out + noise * torch.randn_like(out)

    return AttentionBackend(name=name, bits=bits, unsupported_reason=lambda *_: reason, run=run)


def test_attention(bench: BenchContext, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.ceilings |= {"bf16 GEMM": 1.0, "fp8 GEMM": 2.0}
    known = (
        provider("cudnn", 16),
        provider("triton", 16),
        provider("absent", 16, reason="it is not installed"),
        provider("triton-8bit", 8, noise=1e-3),
    )
    monkeypatch.setattr(attention, "BACKENDS", {p.name: p for p in known})
    record = run_one(bench, partial(attention.attention, model=MODEL, size=SIZE))
    rows = {row["by"]: row for row in record["rows"]}
    assert rows["absent"]["error"] == "it is not installed"
    flops = 4 * SIZE.tokens**2 * CONFIG.dim
    for name in ("cudnn", "triton", "triton-8bit"):
        row = rows[name]
        assert row["rate"] == pytest.approx(1e3 * flops / row["ms"])
        assert row["numerics"]["cosine"] > 0.999
        assert row["numerics"]["worst_row"] <= row["numerics"]["cosine"] + 1e-6
    assert rows["triton-8bit"]["of_ceiling"] == pytest.approx(rows["triton-8bit"]["rate"] / 2)
    best = min(("cudnn", "triton"), key=lambda name: rows[name]["ms"])
    ours, narrow, right = record["goals"]
    assert ours["value"] == pytest.approx(rows[best]["ms"] / rows["triton"]["ms"])
    assert narrow["value"] == pytest.approx(rows[best]["ms"] / rows["triton-8bit"]["ms"])
    assert right == {
        "goal": right["goal"],
        "value": rows["triton-8bit"]["numerics"]["cosine"],
        "met": True,
    }


def test_no_attention_runs_on_a_processor(bench: BenchContext) -> None:
    record = run_one(bench, partial(attention.attention, model=MODEL, size=SIZE))
    assert all("not on cpu" in row["error"] or "Triton" in row["error"] for row in record["rows"])
    assert [goal["value"] for goal in record["goals"]] == [None] * 3


def test_linears(bench: BenchContext) -> None:
    record = run_one(bench, partial(linears.linears, model=MODEL))
    rows = {(row["what"], row["by"]): row for row in record["rows"]}
    assert {what for what, _ in rows} == {"qkv", "o", "ffn.0", "ffn.2"}
    assert ("ffn.0", "fp8 fused, gelu") in rows
    assert ("o", "fp8 fused, residual") in rows
    for (what, by), row in rows.items():
        assert "error" not in row
        # GELU's rounding to 8 bits differs by a step where the layer's was to bf16 before.
        assert row["numerics"]["relative_rms"] < (0.03 if by == "fp8, gelu" else 0.01), (what, by)
        baseline = {"fp8 fused, gelu": "bf16, gelu", "fp8, residual": "bf16, residual"}.get(by)
        if baseline:
            assert row["speedup"] == {
                baseline: pytest.approx(rows[what, baseline]["ms"] / row["ms"])
            }
    shape = rows["ffn.2", "fp8"]["shape"]
    assert shape == {"L": SIZE.tokens, "K": CONFIG.ffn_dim, "N": CONFIG.dim}
    slowest = min(rows[what, "fp8"]["speedup"]["bf16"] for what in ("qkv", "o", "ffn.0", "ffn.2"))
    assert record["goals"][0]["value"] == pytest.approx(slowest)


def test_a_generation(bench: BenchContext) -> None:
    run = partial(
        generation.generation, bundle=builtin_bundle(), frames=5, width=64, height=64, steps=1
    )
    record = run_one(bench, run)
    processor, made = record["rows"]
    assert len(made["rounds_ms"]) == generation.ROUNDS
    assert made["numerics"]["cosine"] == pytest.approx(1.0)
    assert processor["stages_s"].keys() == {"text", "denoise", "decode"}
    assert record["goals"][0]["met"] is True


def test_a_model_that_was_not_compiled(bench: BenchContext) -> None:
    (bench.folder / "tiny-aoti.error").write_text("exit code 1: no g++")
    with pytest.raises(EnvironmentMismatchError, match="not compiled: exit code 1: no g\\+\\+"):
        list(generation.generation(bench, bench.folder / "tiny-aoti"))


def job(name: str, code: str, **options: Any) -> programs.Job:
    return programs.Job(name=name, command=(sys.executable, "-c", code), **options)


def compiled(
    bench: BenchContext, jobs: list[programs.Job], seconds: float, meanwhile: Any = lambda: None
) -> dict[str, str | None]:
    """Compile beside the worker as the supervisor does; the errors that the worker tells."""
    with programs.Compilation(jobs, bench.folder, time.time() + seconds) as compilation:
        while compilation._running:
            compilation.poll()
        names = [job.name for job in jobs]
        record = run_one(bench, lambda b: programs.programs(b, [*names, "other"], meanwhile))
    errors = {row["by"]: row.get("error") for row in record["rows"]}
    assert errors.pop("other") == "it was not asked for"
    return errors


def test_programs_are_compiled_in_processes_of_their_own(bench: BenchContext) -> None:
    folder = bench.folder / "good"
    jobs = [
        job("good", f"import os; os.mkdir({str(folder)!r})"),
        job("bad", "import sys; sys.exit('out of\\nmemory')"),
        job("lenient", "import os, sys; sys.exit('WANX_STRICT' in os.environ)", strict=False),
    ]
    met: list[str] = []
    errors = compiled(bench, jobs, 60, lambda: met.append("here"))
    assert errors == {"good": None, "bad": "exit code 1: memory", "lenient": None}
    assert (bench.folder / "bad.error").read_text() == "exit code 1: memory"
    assert folder.is_dir()
    assert met == ["here"]


def test_what_compiles_too_long_is_given_up(bench: BenchContext) -> None:
    errors = compiled(bench, [job("slow", "import time; time.sleep(99)")], 0.2)
    assert errors == {"slow": "it was not done within 0 s"}


def test_commands_of_programs(tmp_path: Path) -> None:
    wanted = programs.job("1.3B-fp8-attention", tmp_path)
    assert wanted.command[1:] == (
        *("-m", "benchmarks.gpu.programs", "1.3B", "fp8-attention"),
        str(tmp_path / "1.3B-fp8-attention"),
    )
    tiny = programs.job(programs.TINY, tmp_path)
    assert tiny.command[1:5] == ("-m", "wanx", "export", "tiny")
    assert not tiny.strict


def test_a_program_is_compiled_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wanx.exporter.targets.aoti import AotiBuilder

    built: list[Partition] = []

    def build(self: AotiBuilder, component: str, parts: Partition, folder: Path) -> None:
        assert component == "dit"
        built.append(parts)
        folder.mkdir()

    monkeypatch.setattr(AotiBuilder, "build", build)
    monkeypatch.setattr(sys, "argv", ["programs", "1.3B", "fp8", str(tmp_path / "1.3B-fp8")])
    programs.main()
    assert (tmp_path / "1.3B-fp8").is_dir()
    (parts,) = built
    assert torch.bfloat16 in {item.dtype for item in parts.segments["block"].inputs}
    assert [step.prefix for step in parts.steps if step.program == "block"] == ["blocks.0."]
    names = {name for name, _ in parts.segments["block"].parameters}
    assert "ffn.2.input_scale" in names


def test_distances() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(5, 7, generator=generator)
    b = a + 0.1 * torch.randn(5, 7, generator=generator)
    found = differences([a, b], [b, b])
    assert found["cosine"] == pytest.approx(
        float(torch.cosine_similarity(a.flatten(), b.flatten(), 0))
    )
    assert found["relative_rms"] == pytest.approx(float((a - b).norm() / b.norm()))
    assert found["max_error"] == pytest.approx(float((a - b).abs().max() / b.abs().max()))
    a[1, 2] = math.nan
    assert all(math.isnan(value) for value in differences([a, b], [b, b]).values())
    assert math.isnan(cosine(b, a))
    with pytest.raises(ValueError, match="shapes differ"):
        cosine(a, b[:2])
