"""A matrix product in 8 bits in Triton, and what follows it while it is still in registers.

    y = (x8 weight8ᵀ) · x_scale · weight_scale + bias

x8 ``[M, K]`` and weight8 ``[N, K]``, both int8 or both float8_e4m3fn; x_scale ``[]`` or one number
per row, ``[M]``; weight_scale ``[]`` or ``[N]``; bias ``[N]`` in any floating dtype. Scales are in
fp32. int8 accumulates in int32, e4m3 in fp32, and all that follows runs in fp32. Out comes one of

    y                                           [M, N] in the dtype of bias
    saturate(round(gelu(y) / out_scale))        [M, N] in int8 or e4m3; out_scale [] in fp32
    residual + y · gate                         [B, L, N] like residual, where M = B·L

residual is in any floating dtype, gate ``[B, 1, N]``, or ``[1, 1, N]`` for the whole batch, in
fp32. Rounding and GELU are those of :mod:`wanx.kernels.quantize`. Sizes are arbitrary, and rows of
x8 and weight8 may lie apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wanx.kernels.adaln import unsupported_modulation
from wanx.kernels.launch import FLOATS, jit, launch, sm_of, tl, unsupported_tensors
from wanx.kernels.launch_config import config
from wanx.kernels.number_formats import FORMATS
from wanx.kernels.quantize import RANGES, gelu_tanh, round_to_8bit

E4M3 = torch.float8_e4m3fn
LARGEST_INT8_K = 2**17 - 1  # 128² K stays below 2³¹


def op_in_table(x8: Tensor, weight8: Tensor, *, gelu: bool = False, residual: bool = False) -> str:
    """Name of the entries of :mod:`wanx.kernels.launch_config` for these operands."""
    # The table has the widest blocks that spill no registers: the residual takes as many as the
    # product, and int8 has no tensor memory from SM103 on.
    # Of rows that do not all start at multiples of 16 bytes each byte has its own address.
    if any(number % 16 for number in (x8.shape[1], x8.stride(0), weight8.stride(0))):
        return "gemm_unaligned"
    return f"gemm_{FORMATS[x8.dtype].name}{'_gelu' if gelu else '_residual' if residual else ''}"


def unsupported_reason(
    x8: Tensor,
    x_scale: Tensor,
    weight8: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    *,
    out_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> str | None:
    """Reason why the kernel cannot run, or None; x8 ``[..., K]``, x_scale ``[]`` or one a row."""
    scales = [s for s in (x_scale, weight_scale, out_scale) if s is not None]
    others = [t for t in (residual, gate) if t is not None]
    fp8 = E4M3 in (x8.dtype, dtype)
    if reason := unsupported_tensors(x8, weight8, bias, *scales, *others, fp8=fp8):
        return reason
    if x8.dtype != weight8.dtype or x8.dtype not in RANGES:
        return f"x8 is {x8.dtype} and weight8 {weight8.dtype}"
    if weight8.ndim != 2 or weight8.shape[1] != x8.shape[-1]:
        return f"x8 is {list(x8.shape)} and weight8 {list(weight8.shape)}"
    n, k = weight8.shape
    if x8.dtype == torch.int8 and k > LARGEST_INT8_K:
        return f"sums of {k} products, above {LARGEST_INT8_K}, can overflow int32"
    if bias.dtype not in FLOATS or list(bias.shape) != [n]:
        return f"bias is {bias.dtype} {list(bias.shape)}"
    for scale, most in zip(scales, (x8.numel() // k, n, 1), strict=False):
        if scale.dtype != torch.float32 or scale.numel() not in (1, most):
            return f"a scale is {scale.dtype} {list(scale.shape)}"
        if not scale.is_contiguous():
            return f"a scale {list(scale.shape)} is not contiguous"
    if residual is None or gate is None:
        return None
    if residual.dtype not in FLOATS or list(residual.shape) != [*x8.shape[:-1], n]:
        return f"residual is {residual.dtype} {list(residual.shape)}"
    if residual.ndim != 3 or not residual.is_contiguous():
        return f"residual {list(residual.shape)} is not contiguous or has no three axes"
    return unsupported_modulation(residual, gate)


@jit
def _gemm_8bit_kernel(  # type: ignore[no-untyped-def]
    x8, x_scale, weight8, weight_scale, bias, out_scale, residual, gate, out,
    M, N, K, x_stride, weight_stride, gate_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    X_ROWS: tl.constexpr, WEIGHT_ROWS: tl.constexpr, MASK_K: tl.constexpr, PROMOTE: tl.constexpr,
    GELU: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """M counts the rows of one element of the batch, so that a program needs one row of gate."""
    # Programs that run together share GROUP_M blocks of rows, and few of columns, in L2.
    program = tl.program_id(0)
    in_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_block = program // in_group * GROUP_M
    high = min(tl.cdiv(M, BLOCK_M) - first_block, GROUP_M)
    first_m = (first_block + program % in_group % high) * BLOCK_M
    first_n = program % in_group // high * BLOCK_N
    batch = tl.program_id(1).to(tl.int64)
    first_row = batch * M + first_m
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    # Beyond the end the last row is read again, and not stored.
    x_row = tl.minimum(row, M - 1 - first_m)
    weight_row = tl.minimum(column, N - 1 - first_n)
    x_place = x8 + first_row * x_stride
    x_place += x_row[:, None] * x_stride + depth[None, :]
    weight_place = weight8 + first_n.to(tl.int64) * weight_stride
    weight_place += weight_row[None, :] * weight_stride + depth[:, None]
    kind: tl.constexpr = tl.int32 if x8.dtype.element_ty == tl.int8 else tl.float32
    total = tl.zeros([BLOCK_M, BLOCK_N], kind)
    for first_k in range(0, K, BLOCK_K):
        if MASK_K:
            x = tl.load(x_place, mask=depth[None, :] < K - first_k, other=0.0)
            weight = tl.load(weight_place, mask=depth[:, None] < K - first_k, other=0.0)
        else:
            x = tl.load(x_place)
            weight = tl.load(weight_place)
        if PROMOTE:
            # Tensor cores up to Hopper's keep about 22 bits of an FP8 sum, so each step starts from
            # zero and is added in fp32. Without the argument, the same in Triton 3.6 and 3.9, the
            # compiler makes one sum of it again on all GPUs but Hopper.
            total += tl.dot(x, weight, max_num_imprecise_acc=BLOCK_K)
        else:
            total = tl.dot(x, weight, total, out_dtype=kind)
        x_place += BLOCK_K
        weight_place += BLOCK_K
    y = total.to(tl.float32)
    if X_ROWS:
        y *= tl.load(x_scale + first_row + x_row)[:, None]
    else:
        y *= tl.load(x_scale)
    if WEIGHT_ROWS:
        y *= tl.load(weight_scale + first_n + weight_row)[None, :]
    else:
        y *= tl.load(weight_scale)
    y += tl.load(bias + first_n + weight_row).to(tl.float32)[None, :]
    inside = (row[:, None] < M - first_m) & (column[None, :] < N - first_n)
    first = first_row * N + first_n
    offsets = row[:, None] * N + column[None, :]
    if GELU:
        y = round_to_8bit(gelu_tanh(y) / tl.load(out_scale), out.dtype.element_ty)
    elif RESIDUAL:
        y *= tl.load(gate + batch * gate_stride + first_n + weight_row)[None, :]
        y += tl.load(residual + first + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + first + offsets, y.to(out.dtype.element_ty), mask=inside)


def launch_gemm_8bit(
    x8: Tensor,
    x_scale: Tensor,
    weight8: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    *,
    out_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """Run the kernel; without ``out_scale``, ``residual`` and ``gate`` it stores y.

    Args:
        x8: ``[M, K]``.
        x_scale: contiguous, one number or M.
        weight8: ``[N, K]``.
        weight_scale: contiguous, one number or N.
        bias: ``[N]``.
        out_scale: with ``dtype`` it asks for GELU, rounded to that.
        dtype: of what ``out_scale`` rounds.
        residual: with ``gate`` it asks for the residual, updated.
        gate: ``[B, 1, N]`` or ``[1, 1, N]``.
    """
    (m, k), n = x8.shape, weight8.shape[0]
    sm = sm_of(x8)
    batch, gate_stride = 1, 0
    if residual is None or gate is None:
        out = bias.new_empty((m, n), dtype=bias.dtype if out_scale is None else dtype)
    else:
        out = torch.empty_like(residual)
        batch, gate_stride = residual.shape[0], gate.stride(0) if gate.shape[0] > 1 else 0
    rows = m // batch
    op = op_in_table(x8, weight8, gelu=out_scale is not None, residual=residual is not None)
    meta = config(op, sm, n=n, k=k)
    programs = -(-rows // meta["BLOCK_M"]) * -(-n // meta["BLOCK_N"])
    # What a variant does not use is not looked at: any tensor will do in its place.
    launch(
        _gemm_8bit_kernel, (programs, batch),
        x8, x_scale, weight8, weight_scale, bias, x_scale if out_scale is None else out_scale,
        bias if residual is None else residual, x_scale if gate is None else gate, out,
        rows, n, k, x8.stride(0), weight8.stride(0), gate_stride,
        X_ROWS=bool(x_scale.numel() > 1), WEIGHT_ROWS=bool(weight_scale.numel() > 1),
        MASK_K=k % meta["BLOCK_K"] != 0,
        # Blackwell's data centre GPUs sum in memory of their own, in fp32.
        PROMOTE=x8.dtype == E4M3 and not 100 <= sm < 120,
        GELU=out_scale is not None, RESIDUAL=residual is not None,
        **meta,
    )  # fmt: skip
    return out
