"""Workloads that fill the table of :mod:`wanx.kernels.launch_config`: ops at Wan's sizes.

Inputs are normally distributed. They are made when a workload is prepared, as the largest take
gigabytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wanx.config.number_formats import QUANTIZED
from wanx.kernels.adaln import launch_adaln
from wanx.kernels.attention.backends import BACKENDS, ranked_backends
from wanx.kernels.attention.eight_bit import launch_attention_8bit
from wanx.kernels.attention.flash import launch_attention
from wanx.kernels.gated_residual import launch_gated_residual
from wanx.kernels.gemm_8bit import launch_gemm_8bit
from wanx.kernels.launch import MIN_SM_TMA, sm_of
from wanx.kernels.launch_config import config, with_config, with_ranking
from wanx.kernels.quant_linear import candidate
from wanx.kernels.quantize import launch_quantize
from wanx.kernels.rms_norm_rope import launch_rms_norm_rope

MODELS = ((1536, 12, 8960), (5120, 40, 13824))  # channels, heads and inner width of 1.3B and 14B
LENGTHS = (32760, 75600)  # tokens of 81 frames in 480p and 720p
TEXT = 512  # keys of cross-attention

# Of each op that is a product in 8 bits: its type, and the op of PyTorch that launches it.
GEMMS: dict[str, tuple[torch.dtype, str]] = {
    f"gemm_{row.name}{suffix}": (getattr(torch, row.torch), op)
    for row in QUANTIZED
    for suffix, op in (
        ("", "quant_linear"),
        ("_gelu", "quant_linear_gelu_quantize"),
        ("_residual", "quant_linear_residual"),
    )
}

# All combinations of an op's numbers are tried that the GPU has.
_ROWS: dict[str, tuple[int, ...]] = {"num_warps": (2, 4, 8, 16)}
_NORM: dict[str, tuple[int, ...]] = {"TOKENS": (1, 2, 4, 8, 16), "num_warps": (4, 8, 16)}
_GEMM: dict[str, tuple[int, ...]] = {
    "BLOCK_M": (64, 128, 256),
    "BLOCK_N": (64, 128),
    "BLOCK_K": (64, 128),
    "GROUP_M": (8,),
    "num_warps": (4, 8),
    "num_stages": (3, 4),
}
GRIDS: dict[str, dict[str, tuple[int, ...]]] = {
    "adaln": _NORM,
    "residual_adaln": _NORM,
    "rms_norm_rope": _ROWS,
    "quantize": _ROWS,
    "gelu_quantize": _ROWS,
    "gated_residual": {"TOKENS": (1, 2, 4, 8), "BLOCK": (512, 1024, 2048), "num_warps": (4, 8)},
    **dict.fromkeys(GEMMS, _GEMM),
    "attention": {
        "BLOCK_Q": (64, 128),
        "BLOCK_K": (32, 64, 128),
        "TMA": (0, 1),
        "WARP_SPECIALIZE": (0, 1),
        "num_warps": (4, 8),
        "num_stages": (2, 3),
    },
    "attention_8bit": {
        "BLOCK_Q": (64, 128),
        "BLOCK_K": (64, 128),
        "TMA": (0, 1),
        "WARP_SPECIALIZE": (0, 1),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    },
}
BACKEND_BITS = {"attention_providers_16bit": 16, "attention_providers_8bit": 8}
PRODUCTS = ("quant_linear", "quant_linear_gelu_quantize", "quant_linear_residual")
# What the table ranks implementations of, by name.
RANKED = (*BACKEND_BITS, *PRODUCTS)
OPS = (*GRIDS, *RANKED)
# By how much a right result may differ, in relative RMS: by another order of sums and steps of
# rounding that they move; by all that 8 bits lose; by what rounding to 16 bits in between moves.
_TOLERANCES = {
    "attention_8bit": 0.06,
    "attention_providers_8bit": 0.1,
    **dict.fromkeys(PRODUCTS, 0.06),
}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run an op.

    Attributes:
        name: of the backend, or of the meta-parameters.
        choice: the meta-parameters; empty for a backend.
        call: runs it, and returns a tensor or several.
    """

    name: str
    choice: dict[str, int]
    call: Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """An op at one shape.

    Attributes:
        op: its name in the table.
        shape: what the op asks the table with.
        tolerance: by how much results may differ from the first candidate's, in relative RMS.
        prepare: makes inputs and candidates. The first one has the right result: meta-parameters
            that are in use, or the first backend of 16 bits.
    """

    op: str
    shape: dict[str, int]
    tolerance: float
    prepare: Callable[[], list[Candidate]]


def workloads(op: str, device: torch.device) -> Iterator[Workload]:
    """An op of :data:`OPS` at Wan's sizes, on a GPU."""
    sizes = [(length, length) for length in LENGTHS]
    if op.startswith("attention"):
        sizes.append((LENGTHS[0], TEXT))
    if op in PRODUCTS or op in GEMMS:  # which are asked for by the sides of the weight alone
        sizes = sizes[:1]
    # The ranking of backends is asked for by the number of keys alone.
    for model in MODELS[-1:] if op in BACKEND_BITS else MODELS:
        for length, keys in sizes:
            yield workload(op, model, length, keys, device)


def workload(
    op: str, model: tuple[int, int, int], length: int, keys: int, device: torch.device
) -> Workload:
    """One op at one size.

    Args:
        op: one of :data:`OPS`.
        model: channels, heads and inner width, as in :data:`MODELS`.
        length: tokens.
        keys: what each query attends to.
        device: where it runs.
    """
    dim, heads, inner = model
    if op in BACKEND_BITS:
        shape = {"keys": keys}
    elif op in PRODUCTS:
        n, k = _sides(op, model)
        shape = {"n": n, "k": k}
    elif op in GEMMS:
        n, k = _sides(GEMMS[op][1], model)
        shape = {"n": n, "k": k}
    elif op.startswith("attention"):
        shape = {"head": dim // heads, "keys": keys, "heads": heads}
    elif op.endswith("quantize"):
        shape = {"width": inner if op == "gelu_quantize" else dim, "rows": length}
    else:
        shape = {"dim": dim, "length": length}

    def prepare() -> list[Candidate]:
        if op in BACKEND_BITS:
            return _backends(BACKEND_BITS[op], *_attention_inputs(model, length, keys, device))
        if op in PRODUCTS:
            return _products(op, model, length, device)
        call, sm = _launch(op, model, length, keys, device)
        return configured(op, config(op, sm, **shape), call, sm)

    return Workload(op=op, shape=shape, tolerance=_TOLERANCES.get(op, 0.01), prepare=prepare)


def grid(op: str, present: dict[str, int], sm: int) -> list[dict[str, int]]:
    """Candidates for an op on a GPU such as 90, the present choice first."""
    names, values = zip(*GRIDS[op].items(), strict=True)
    every = (dict(zip(names, numbers, strict=True)) for numbers in itertools.product(*values))
    return [present, *(choice for choice in every if choice != present and _differs(choice, sm))]


def _differs(choice: dict[str, int], sm: int) -> bool:
    """True if a GPU runs the choice, and not as it runs another."""
    if not choice.get("TMA"):
        return not choice.get("WARP_SPECIALIZE")
    # Triton's warps do not specialise without TMA, nor on Hopper in other groups than of 4.
    hopper = sm // 10 == 9
    return sm >= MIN_SM_TMA and not (
        choice["WARP_SPECIALIZE"] and hopper and choice["num_warps"] != 4
    )


def configured(
    op: str, present: dict[str, int], call: Callable[[], Any], sm: int
) -> list[Candidate]:
    """A candidate for each set of meta-parameters with which ``call`` runs the op's kernel."""

    def run(choice: dict[str, int]) -> Any:
        with with_config(op, choice):
            return call()

    return [
        Candidate(
            name=" ".join(f"{name}={number}" for name, number in choice.items()),
            choice=choice,
            call=partial(run, choice),
        )
        for choice in grid(op, present, sm)
    ]


def _backends(
    bits: int, q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float
) -> list[Candidate]:
    """Backends that run on these tensors; the first of 16 bits first, as it is the most exact."""
    known = [*ranked_backends(sm_of(q), bits=16, keys=k.shape[1]), *BACKENDS.values()]
    return [
        Candidate(name=p.name, choice={}, call=partial(p.run, q, k, v, heads, scale))
        for p in dict.fromkeys(known)
        if p.bits >= bits and p.unsupported_reason(q, k, v, heads) is None
    ]


def _sides(op: str, model: tuple[int, int, int]) -> tuple[int, int]:
    """Outputs and inputs of the layer that an op stands for."""
    dim, _, inner = model
    return {"quant_linear": (3 * dim, dim), "quant_linear_residual": (dim, inner)}.get(
        op, (inner, dim)
    )


def _products(
    op: str, model: tuple[int, int, int], length: int, device: torch.device
) -> list[Candidate]:
    """PyTorch's product and ours, with what follows it, where the GPU has both."""
    layer, others = _product_inputs(op, model, length, torch.float8_e4m3fn, device)
    values = (*layer, *others)
    run = getattr(torch.ops.wanx, op)

    def by(name: str) -> Any:
        with with_ranking(op, [name]):
            return run(*values)

    return [
        Candidate(name=name, choice={}, call=partial(by, name))
        for name in ("torch", "triton")
        if not isinstance(candidate(name, *layer), str)
    ]


def _product_inputs(
    op: str,
    model: tuple[int, int, int],
    length: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Arguments of a linear layer in 8 bits, and those of what follows it."""
    n, k = _sides(op, model)
    # Small enough for int8, and so that no sum is beyond the range of the 8 bits that may follow.
    spread = 1.0 if dtype.is_floating_point else 40.0
    x8, weight8 = (
        (torch.randn(shape, device=device) * spread).to(dtype) for shape in ((1, length, k), (n, k))
    )
    scale = torch.tensor(0.02 / spread, device=device)
    scales = torch.full((n,), 1e-3 / spread, device=device)
    bias = torch.randn(n, device=device, dtype=torch.bfloat16)
    layer = (x8, scale, weight8, scales, bias)
    if op == "quant_linear_gelu_quantize":
        return layer, (scale, dtype)
    if op == "quant_linear_residual":
        stream = torch.randn(1, length, n, device=device)
        return layer, (stream, torch.randn(1, 1, n, device=device))
    return layer, ()


def _attention_inputs(
    model: tuple[int, int, int], length: int, keys: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, int, float]:
    dim, heads, _ = model
    q, k, v = (
        torch.randn(1, n, dim, device=device, dtype=torch.bfloat16) for n in (length, keys, keys)
    )
    return q, k, v, heads, (dim // heads) ** -0.5


def _launch(
    op: str, model: tuple[int, int, int], length: int, keys: int, device: torch.device
) -> tuple[Callable[[], Any], int]:
    """Callable that launches the kernel on random inputs, and the GPU that it is for."""
    if op.startswith("attention"):
        inputs = _attention_inputs(model, length, keys, device)
        launch = launch_attention if op == "attention" else launch_attention_8bit
        return partial(launch, *inputs), sm_of(inputs[0])
    if op in GEMMS:
        dtype, product = GEMMS[op]
        (x8, *layer), others = _product_inputs(product, model, length, dtype, device)
        names = ("out_scale", "dtype") if op.endswith("_gelu") else ("residual", "gate")
        following = dict(zip(names, others, strict=False))
        return partial(launch_gemm_8bit, x8.flatten(0, 1), *layer, **following), sm_of(x8)
    dim, heads, inner = model

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    bf16 = torch.bfloat16
    z, row, step = random(1, length, dim, dtype=bf16), random(1, 1, dim), random().abs() + 0.01
    sm = sm_of(z)
    narrow = torch.float8_e4m3fn if sm >= 89 else torch.int8
    call: Callable[[], Any]
    match op:
        case "adaln" | "residual_adaln":
            added = {"z": z, "gate": row} if op == "residual_adaln" else {}
            x = random(1, length, dim)
            call = partial(launch_adaln, x, row, row, 1e-6, dtype=narrow, q_scale=step, **added)
        case "rms_norm_rope":
            weight, table = random(dim, dtype=bf16), random(length, dim // heads // 2)
            call = partial(
                launch_rms_norm_rope, z, z.clone(), weight, weight, table, table, heads, 1e-6
            )
        case "gated_residual":
            call = partial(launch_gated_residual, random(1, length, dim), z, row)
        case "quantize":
            call = partial(launch_quantize, z, step, narrow)
        case _:
            wide = random(1, length, inner, dtype=bf16)
            call = partial(launch_quantize, wide, step, narrow, gelu=True)
    return call, sm
