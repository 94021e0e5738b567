"""Products, attention and what is not a family of memory-bound ops, with inputs and references."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.context import BenchContext
from benchmarks.gpu.kernel_cases import BF16, E4M3, INT8, KernelCase
from wanx.config.models import DiTConfig
from wanx.kernels.attention.backends import BACKENDS, AttentionBackend
from wanx.kernels.attention.op import attention, attention_reference
from wanx.kernels.attention.quant_attention import quant_attention, quant_attention_reference
from wanx.kernels.channel_norm import channel_norm
from wanx.kernels.gemm_8bit import launch_gemm_8bit
from wanx.kernels.launch_config import with_ranking
from wanx.kernels.quant_linear import (
    quant_linear,
    quant_linear_reference,
    quant_linear_rows,
)
from wanx.kernels.quant_linear_gelu_quantize import (
    quant_linear_gelu_quantize,
    quant_linear_gelu_quantize_reference,
)
from wanx.kernels.quant_linear_residual import (
    quant_linear_residual,
    quant_linear_residual_reference,
)
from wanx.kernels.weight_only_linear import weight_only_linear, weight_only_linear_reference
from wanx.models.quantized import quantize_weight

STEP, OUT_STEP = 0.01, 0.005  # scales of inputs and of results in 8 bits
EIGHT_BIT = 0.03  # relative RMS: a step of fp8 is 6 % of a number, and few round to another
LOSSY = 0.1  # of attention whose operands are rounded to 8 bits, against exact attention


def products(bench: BenchContext, config: DiTConfig, tokens: int) -> list[KernelCase]:
    """8-bit layers and what is fused to them, in each implementation that the table can choose."""
    dim, ffn = config.dim, config.ffn_dim

    def inputs(n: int, k: int, dtype: torch.dtype = E4M3) -> tuple[Tensor, ...]:
        """x8, its scale, the weight, its scales and the bias of a layer from k to n numbers."""
        weight, scales = quantize_weight(bench.random(n, k) / k**0.5, dtype)
        wide = bench.random(1, tokens, k)
        x8 = (wide * 32).round().to(INT8) if dtype == INT8 else (wide / STEP).clamp(-448, 448)
        scale = torch.full((), STEP, device=bench.device)
        return x8.to(dtype), scale, weight, scales, bench.random(n, dtype=BF16)

    def step() -> Tensor:
        return torch.full((), OUT_STEP, device=bench.device)

    def chosen(op: str, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Tensor) -> Any:
            with with_ranking(op, [name]):
                return call(*arguments)

        return run

    cases = []
    for name in ("torch", "triton"):
        cases += [
            KernelCase(
                name=f"quant_linear, {name}",
                ours=chosen("quant_linear", name, quant_linear),
                reference=quant_linear_reference,
                arguments=lambda: inputs(dim, dim),
            ),
            KernelCase(
                name=f"quant_linear_gelu_quantize, {name}",
                ours=chosen(
                    "quant_linear_gelu_quantize", name,
                    lambda *values: quant_linear_gelu_quantize(*values, E4M3),
                ),
                reference=lambda *values: quant_linear_gelu_quantize_reference(*values, E4M3),
                arguments=lambda: (*inputs(ffn, dim), step()),
                tolerance=EIGHT_BIT,
            ),
            KernelCase(
                name=f"quant_linear_residual, {name}",
                ours=chosen("quant_linear_residual", name, quant_linear_residual),
                reference=quant_linear_residual_reference,
                arguments=lambda: (
                    *inputs(dim, ffn), bench.random(1, tokens, dim), bench.random(1, 1, dim),
                ),
            ),
        ]  # fmt: skip
    cases.append(
        KernelCase(
            name="quant_linear_rows, fp8",
            ours=quant_linear_rows,
            reference=quant_linear_reference,
            arguments=lambda: _with_rows(inputs(dim, dim)),
        )
    )
    if bench.device.type == "cuda":  # a kernel itself needs one
        for kind, dtype in (("fp8", E4M3), ("int8", INT8)):
            cases.append(
                KernelCase(
                    name=f"gemm_8bit, {kind}",
                    ours=lambda x8, *rest: launch_gemm_8bit(x8.flatten(0, -2), *rest),
                    reference=lambda x8, *rest: quant_linear_reference(x8.flatten(0, -2), *rest),
                    arguments=partial(inputs, dim, dim, dtype),
                )
            )
    return cases


def _with_rows(arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same with a scale for each row."""
    x8, scale, *rest = arguments
    return x8, scale.expand(*x8.shape[:-1], 1).contiguous(), *rest


def attentions(bench: BenchContext, config: DiTConfig, tokens: int) -> list[KernelCase]:
    """Attention of the transformer to itself and to the text, in all implementations that run."""
    heads, scale = config.num_heads, config.head_dim**-0.5

    def inputs(keys: int) -> tuple[Tensor, ...]:
        lengths = (tokens, keys, keys)
        return tuple(bench.random(1, n, config.dim, dtype=BF16) for n in lengths)

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_reference(q, k, v, None, heads, scale)

    cases = [
        KernelCase(
            name=f"attention, {keys} keys",
            ours=partial(attention, num_heads=heads),
            reference=reference,
            arguments=partial(inputs, keys),
        )
        for keys in (tokens, config.text_len)
    ]
    backends: dict[str, AttentionBackend] = BACKENDS
    for name, backend in backends.items():
        if backend.unsupported_reason(*inputs(tokens), heads) is None:
            cases.append(
                KernelCase(
                    name=f"attention, {name}",
                    ours=partial(_attend, backend, heads, scale),
                    reference=reference,
                    arguments=partial(inputs, tokens),
                    tolerance=0.01 if backend.bits == 16 else LOSSY,
                )
            )
    steps = [torch.full((), 4 / 448, device=bench.device) for _ in range(3)]
    cases.append(
        KernelCase(
            name="quant_attention, fp8",
            ours=partial(quant_attention, num_heads=heads),
            reference=lambda *values: quant_attention_reference(*values, heads, scale),
            arguments=lambda: (*inputs(tokens), *steps),
            tolerance=LOSSY,
        )
    )
    return cases


def _attend(backend: AttentionBackend, heads: int, scale: float, *inputs: Tensor) -> Tensor:
    return backend.run(*inputs, heads, scale)


def others(bench: BenchContext, config: DiTConfig, tokens: int) -> list[KernelCase]:
    """Ops of the text encoder and of the VAE."""
    heads, scale, dim = config.num_heads, config.head_dim**-0.5, config.dim

    def text() -> tuple[Tensor, ...]:
        q, k, v = (bench.random(1, tokens, dim) for _ in range(3))
        return q, k, v, bench.random(1, heads, tokens, tokens)

    def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        weights = torch.softmax(q @ k.transpose(-2, -1) * scale + bias, -1)
        return (weights @ v).transpose(1, 2).flatten(-2)

    return [
        KernelCase(
            name="biased_attention, fp32",
            ours=lambda q, k, v, bias: attention(q, k, v, num_heads=heads, bias=bias),
            reference=softmax_attention,
            arguments=text,
        ),
        KernelCase(
            name="weight_only_linear, int8",
            ours=weight_only_linear,
            reference=weight_only_linear_reference,
            arguments=lambda: (
                bench.random(1, tokens, dim, dtype=BF16),
                *quantize_weight(bench.random(dim, dim) / dim**0.5, INT8),
            ),
        ),
        KernelCase(
            name="channel_norm, fp32",
            ours=channel_norm,
            reference=lambda x, weight: F.normalize(x, dim=1) * x.shape[1] ** 0.5 * weight,
            arguments=lambda: (bench.random(1, 96, 1, 37, 23), bench.random(96, 1, 1, 1)),
        ),
    ]
