"""Memory-bound ops as the transformer calls them, with their inputs and references."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.gpu.context import BenchContext
from wanx.config.models import DiTConfig
from wanx.kernels.adaln import adaln, adaln_reference
from wanx.kernels.adaln_quantize import (
    adaln_quantize,
    adaln_quantize_reference,
    adaln_quantize_rows,
    adaln_quantize_rows_reference,
)
from wanx.kernels.gated_residual import gated_residual, gated_residual_reference
from wanx.kernels.gelu_quantize import (
    gelu_quantize,
    gelu_quantize_reference,
    gelu_quantize_rows,
    gelu_quantize_rows_reference,
)
from wanx.kernels.quantize import (
    quantize,
    quantize_reference,
    quantize_rows,
    quantize_rows_reference,
)
from wanx.kernels.residual_adaln import (
    residual_adaln,
    residual_adaln_quantize,
    residual_adaln_quantize_reference,
    residual_adaln_reference,
)
from wanx.kernels.rms_norm import rms_norm, rms_norm_reference
from wanx.kernels.rms_norm_rope import rms_norm_rope, rms_norm_rope_reference
from wanx.kernels.rms_norm_rope_quantize import (
    rms_norm_rope_quantize,
    rms_norm_rope_quantize_reference,
)

E4M3, INT8, BF16 = torch.float8_e4m3fn, torch.int8, torch.bfloat16
STEP = 0.01  # of static scales: amax of a few units over 448


@dataclass(frozen=True, kw_only=True)
class KernelCase:
    """An op with its inputs.

    Attributes:
        name: of the op and its variant, ``op, variant``.
        ours: the op.
        reference: the same in PyTorch's operators, on the same arguments.
        arguments: makes them, random.
        compiled: whether the reference is compiled too; variants would tell the same again.
        tolerance: the most that results may differ in relative RMS from the reference's.
    """

    name: str
    ours: Callable[..., Any]
    reference: Callable[..., Any]
    arguments: Callable[[], tuple[Tensor, ...]]
    compiled: bool = True
    tolerance: float = 0.01

    @property
    def op(self) -> str:
        """The name of the op."""
        return self.name.partition(",")[0]

    def references(self, arguments: tuple[Tensor, ...]) -> list[Tensor]:
        """The reference's results with nothing but its 8-bit results rounded to less than fp32."""
        wide = (t.float() if t.dtype == BF16 else t for t in arguments)
        results: list[Tensor] = tree_leaves(self.reference(*wide))
        return results


def families(bench: BenchContext, config: DiTConfig, tokens: int) -> dict[str, list[KernelCase]]:
    """Ops at one size, by what they have in common."""
    dim, heads, eps = config.dim, config.num_heads, config.eps
    wide = partial(bench.random, 1, tokens, dim)
    half = partial(bench.random, 1, tokens, dim, dtype=BF16)
    inner = partial(bench.random, 1, tokens, config.ffn_dim, dtype=BF16)
    row = partial(bench.random, 1, 1, dim)
    weight = partial(bench.random, dim, dtype=BF16)

    def step() -> Tensor:
        return torch.full((), STEP, device=bench.device)

    def queries() -> tuple[Tensor, ...]:
        # As they come out of one product for q, k and v.
        q, k, _ = bench.random(1, tokens, 3 * dim, dtype=BF16).tensor_split(3, dim=-1)
        angles = bench.random(tokens, config.head_dim // 2)
        return q, k, weight(), weight(), angles.cos(), angles.sin()

    def adaln_case(kind: str, dtype: torch.dtype) -> KernelCase:
        return KernelCase(
            name=f"adaln_quantize, {kind}",
            ours=lambda x, scale, shift, by: adaln_quantize(
                x, scale, shift, by, eps=eps, dtype=dtype
            ),
            reference=lambda x, scale, shift, by: adaln_quantize_reference(
                x, scale, shift, by, eps, dtype
            ),
            arguments=lambda: (wide(), row(), row(), step()),
            compiled=dtype == E4M3,
        )

    def gelu_case(kind: str, dtype: torch.dtype) -> KernelCase:
        return KernelCase(
            name=f"gelu_quantize, {kind}",
            ours=lambda x, by: gelu_quantize(x, by, dtype),
            reference=lambda x, by: gelu_quantize_reference(x, by, dtype),
            arguments=lambda: (inner(), step()),
            compiled=dtype == E4M3,
        )

    return {
        "adaln": [
            KernelCase(
                name="adaln, bf16",
                ours=lambda x, scale, shift: adaln(x, scale, shift, eps=eps, dtype=BF16),
                reference=lambda x, scale, shift: adaln_reference(x, scale, shift, eps).to(BF16),
                arguments=lambda: (wide(), row(), row()),
            ),
            KernelCase(
                name="adaln, fp32",
                ours=lambda x, scale, shift: adaln(x, scale, shift, eps=eps),
                reference=lambda x, scale, shift: adaln_reference(x, scale, shift, eps),
                arguments=lambda: (wide(), row(), row()),
                compiled=False,
            ),
            adaln_case("fp8", E4M3),
            adaln_case("int8", INT8),
            KernelCase(
                name="adaln_quantize_rows, fp8",
                ours=lambda x, scale, shift: adaln_quantize_rows(x, scale, shift, eps=eps),
                reference=lambda x, scale, shift: adaln_quantize_rows_reference(
                    x, scale, shift, eps
                ),
                arguments=lambda: (wide(), row(), row()),
                compiled=False,
            ),
        ],
        "residual_adaln": [
            KernelCase(
                name="residual_adaln",
                ours=lambda x, z, gate, scale, shift: residual_adaln(
                    x, z, gate, scale, shift, eps=eps
                ),
                reference=lambda x, z, gate, scale, shift: residual_adaln_reference(
                    x, z, gate, scale, shift, eps
                ),
                arguments=lambda: (wide(), half(), row(), row(), row()),
            ),
            KernelCase(
                name="residual_adaln_quantize, fp8",
                ours=lambda x, z, gate, scale, shift, by: residual_adaln_quantize(
                    x, z, gate, scale, shift, by, eps=eps, dtype=E4M3
                ),
                reference=lambda x, z, gate, scale, shift, by: residual_adaln_quantize_reference(
                    x, z, gate, scale, shift, by, eps, E4M3
                ),
                arguments=lambda: (wide(), half(), row(), row(), row(), step()),
            ),
        ],
        "gated_residual": [
            KernelCase(
                name="gated_residual",
                ours=gated_residual,
                reference=gated_residual_reference,
                arguments=lambda: (wide(), half(), row()),
            )
        ],
        "rms_norm": [
            KernelCase(
                name="rms_norm",
                ours=lambda x, w: rms_norm(x, w, eps=eps),
                reference=lambda x, w: rms_norm_reference(x, w, eps),
                arguments=lambda: (half(), weight()),
            )
        ],
        "rms_norm_rope": [
            KernelCase(
                name="rms_norm_rope",
                ours=lambda q, k, qw, kw, cos, sin: rms_norm_rope(
                    q, k, qw, kw, cos, sin, num_heads=heads, eps=eps
                ),
                reference=lambda q, k, qw, kw, cos, sin: rms_norm_rope_reference(
                    q, k, qw, kw, cos, sin, heads, eps
                ),
                arguments=queries,
            ),
            KernelCase(
                name="rms_norm_rope_quantize, fp8",
                ours=lambda q, k, qw, kw, cos, sin, q_by, k_by: rms_norm_rope_quantize(
                    q, k, qw, kw, cos, sin, q_by, k_by, num_heads=heads, eps=eps
                ),
                reference=lambda q, k, qw, kw, cos, sin, q_by, k_by: (
                    rms_norm_rope_quantize_reference(q, k, qw, kw, cos, sin, q_by, k_by, heads, eps)
                ),
                arguments=lambda: (*queries(), step(), step()),
            ),
        ],
        "quantize": [
            KernelCase(
                name="quantize, fp8",
                ours=lambda x, by: quantize(x, by, E4M3),
                reference=lambda x, by: quantize_reference(x, by, E4M3),
                arguments=lambda: (half(), step()),
            ),
            KernelCase(
                name="quantize_rows, fp8",
                ours=quantize_rows,
                reference=quantize_rows_reference,
                arguments=lambda: (half(),),
                compiled=False,
            ),
        ],
        "gelu_quantize": [
            gelu_case("fp8", E4M3),
            gelu_case("int8", INT8),
            KernelCase(
                name="gelu_quantize_rows, fp8",
                ours=gelu_quantize_rows,
                reference=gelu_quantize_rows_reference,
                arguments=lambda: (inner(),),
                compiled=False,
            ),
        ],
    }
