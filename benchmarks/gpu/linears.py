"""Linear layers in 8 bits, with and without fused epilogues, against bf16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.context import BenchContext, FirstRun
from benchmarks.gpu.distances import differences
from benchmarks.gpu.report import Goal, Measurement, ReportItem
from benchmarks.gpu.sizes import Model
from benchmarks.gpu.timing import time_interleaved
from wanx.benchmarks.speed.roofline.gpu_peaks import BF16, FP8, INT8
from wanx.kernels.gated_residual import gated_residual, gated_residual_reference
from wanx.kernels.gelu_quantize import gelu_quantize, gelu_quantize_reference
from wanx.kernels.gemm_8bit import launch_gemm_8bit
from wanx.kernels.quant_linear import quant_linear, quant_linear_reference, quant_linear_rows
from wanx.kernels.quant_linear_gelu_quantize import quant_linear_gelu_quantize
from wanx.kernels.quant_linear_residual import quant_linear_residual
from wanx.models.quantized import quantize_weight

E4M3 = torch.float8_e4m3fn
PLAIN = "bf16"
X_SCALE, OUT_SCALE = 0.01, 0.005
PROBES = 512  # rows that are compared


@dataclass(frozen=True, kw_only=True)
class LinearVariant:
    """An implementation of a layer.

    Attributes:
        call: runs it.
        reference: its first rows in fp32, from the same 8-bit numbers.
        peak: the ceiling of its product.
    """

    call: Callable[[], Tensor]
    reference: Callable[[], Tensor]
    peak: str


def linears(bench: BenchContext, model: Model) -> Iterator[ReportItem]:
    """Measure the layers of a block at all sizes."""
    dim, ffn = model.config.dim, model.config.ffn_dim
    layers = (("qkv", dim, 3 * dim), ("o", dim, dim), ("ffn.0", dim, ffn), ("ffn.2", ffn, dim))
    worst: list[float | None] = []
    for size in bench.sizes:
        for name, k, n in layers:
            variants = _variants(bench, name, size.tokens, k, n)
            measured: dict[str, Measurement] = {}
            for row in _measure(bench, name, variants, {"L": size.tokens, "K": k, "N": n}):
                measured[row.implementation] = row
                yield row
            worst.append(measured["fp8"].speedup.get(PLAIN))
            del variants
            bench.release()
    ratios = [ratio for ratio in worst if ratio is not None]
    slowest = min(ratios) if len(ratios) == len(worst) else None
    yield Goal.at_least("every fp8 linear 1.6 times as fast as in bf16", slowest, 1.6)


def _measure(
    bench: BenchContext, name: str, variants: dict[str, LinearVariant], shape: dict[str, int]
) -> Iterator[Measurement]:
    first_runs: dict[str, FirstRun] = {}
    for by, variant in variants.items():
        first_runs[by] = bench.first_run(
            f"{name}, {shape['L']}, {by}", variant.call, _check(variant)
        )
    good = {by: variant.call for by, variant in variants.items() if first_runs[by].error is None}
    times = time_interleaved(bench, good, short=True)
    work = 2.0 * shape["L"] * shape["K"] * shape["N"]
    for by, variant in variants.items():
        if by not in times:
            yield Measurement(
                operation=name, implementation=by, shape=shape, error=first_runs[by].error
            )
            continue
        # What ends in GELU or in the residual is compared with bf16 that does the same.
        _, _, ending = by.partition(", ")
        plain = f"{PLAIN}, {ending}" if ending else PLAIN
        speedup = {}
        if by != plain and plain in times:
            speedup = {plain: times[plain].median / times[by].median}
        yield Measurement(
            operation=name,
            implementation=by,
            shape=shape,
            times=times[by],
            rate=work / times[by].median,
            peak=variant.peak,
            ceiling=bench.ceilings.get(variant.peak),
            speedup=speedup,
            numerics=first_runs[by].numerics,
        )


def _check(variant: LinearVariant) -> Callable[[Tensor], dict[str, float]]:
    def check(result: Tensor) -> dict[str, float]:
        reference = variant.reference()
        return differences([result.reshape(-1, result.shape[-1])[: len(reference)]], [reference])

    return check


def _variants(
    bench: BenchContext, name: str, tokens: int, k: int, n: int
) -> dict[str, LinearVariant]:
    """All variants of a layer on the same numbers."""
    few = min(PROBES, tokens)
    x = bench.random(1, tokens, k, dtype=torch.bfloat16)
    weight = bench.random(n, k, dtype=torch.bfloat16) / k**0.5
    bias = bench.random(n, dtype=torch.bfloat16)
    scale = torch.full((), X_SCALE, device=bench.device)
    rows = torch.full((1, tokens, 1), X_SCALE, device=bench.device)
    out_scale = torch.full((), OUT_SCALE, device=bench.device)
    x8 = (x.float() / X_SCALE).clamp(-448, 448).to(E4M3)
    x_int = (x.float() * 32).round().clamp(-127, 127).to(torch.int8)
    weight8, weight_scale = quantize_weight(weight, E4M3)
    weight_int, int_scale = quantize_weight(weight, torch.int8)
    layer, int_layer = (weight8, weight_scale, bias), (weight_int, int_scale, bias)

    def wide(x8: Tensor, weights: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Tensor]:
        """The first rows in fp32."""
        weight8, weight_scale, bias = weights
        return lambda: quant_linear_reference(
            x8.reshape(-1, k)[:few], scale, weight8, weight_scale, bias.float()
        )

    def plain() -> Tensor:
        return F.linear(x[0, :few].float(), weight.float(), bias.float())

    fp8, int8 = wide(x8, layer), wide(x_int, int_layer)
    flat, flat_int = x8.reshape(-1, k), x_int.reshape(-1, k)
    variants = {
        PLAIN: LinearVariant(call=lambda: F.linear(x, weight, bias), reference=plain, peak=BF16),
        "fp8": LinearVariant(call=lambda: quant_linear(x8, scale, *layer), reference=fp8, peak=FP8),
        "fp8 rows": LinearVariant(
            call=lambda: quant_linear_rows(x8, rows, *layer), reference=fp8, peak=FP8
        ),
        "fp8 triton": LinearVariant(
            call=lambda: launch_gemm_8bit(flat, scale, *layer), reference=fp8, peak=FP8
        ),
        "int8 triton": LinearVariant(
            call=lambda: launch_gemm_8bit(flat_int, scale, *int_layer), reference=int8, peak=INT8
        ),
    }
    if bench.device.type != "cuda":  # a kernel itself needs one
        del variants["fp8 triton"], variants["int8 triton"]
    if name == "ffn.0":
        variants |= _with_gelu(variants, (x8, scale, *layer), out_scale, (x, weight, bias), fp8)
    elif name in ("o", "ffn.2"):
        residual, gate = bench.random(1, tokens, n), bench.random(1, 1, n)
        values = (x8, scale, *layer)
        variants |= {
            f"{PLAIN}, residual": LinearVariant(
                call=lambda: gated_residual(residual, F.linear(x, weight, bias), gate),
                reference=lambda: gated_residual_reference(residual[:, :few], plain()[None], gate)[
                    0
                ],
                peak=BF16,
            ),
            "fp8, residual": LinearVariant(
                call=lambda: gated_residual(residual, quant_linear(*values), gate),
                reference=lambda: gated_residual_reference(residual[:, :few], fp8()[None], gate)[0],
                peak=FP8,
            ),
            "fp8 fused, residual": LinearVariant(
                call=lambda: quant_linear_residual(*values, residual, gate),
                reference=lambda: gated_residual_reference(residual[:, :few], fp8()[None], gate)[0],
                peak=FP8,
            ),
        }
    return variants


def _with_gelu(
    variants: dict[str, LinearVariant],
    values: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    out_scale: Tensor,
    plain: tuple[Tensor, Tensor, Tensor],
    fp8: Callable[[], Tensor],
) -> dict[str, LinearVariant]:
    """The first layer of the feed-forward network with its GELU."""
    bf16 = variants[PLAIN]

    def reference8() -> Tensor:
        return gelu_quantize_reference(fp8(), out_scale, E4M3)

    return {
        f"{PLAIN}, gelu": LinearVariant(
            call=lambda: F.gelu(F.linear(*plain), approximate="tanh"),
            reference=lambda: F.gelu(bf16.reference(), approximate="tanh"),
            peak=BF16,
        ),
        "fp8, gelu": LinearVariant(
            call=lambda: gelu_quantize(quant_linear(*values), out_scale, E4M3),
            reference=reference8,
            peak=FP8,
        ),
        "fp8 fused, gelu": LinearVariant(
            call=lambda: quant_linear_gelu_quantize(*values, out_scale, E4M3),
            reference=reference8,
            peak=FP8,
        ),
    }
