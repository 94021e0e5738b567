"""Kernels compiled ahead of time, for GPUs that this machine need not have.

    python -m wanx.kernels.aot_compile --sm 80 --sm 90

compiles every kernel as Wan2.1 launches it and prints what it takes on each GPU.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanx.config.number_formats import KERNEL_TENSORS
from wanx.errors import UsageError
from wanx.kernels.launch import capture_launches
from wanx.kernels.number_formats import FORMATS

SPILL_BYTES = 200  # of a thread's stack: more is a kernel that does not fit its GPU
KNOWN_SM = (80, 89, 90, 100, 120)
_POINTERS = {dtype: f"*{row.triton}" for dtype, row in FORMATS.items() if row.triton}
_OLDEST_SM = {f"*{row.triton}": row.oldest_sm for row in KERNEL_TENSORS}
_COMPILER = ("num_warps", "num_stages")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Launch of a kernel: grid, arguments and options.

    Attributes:
        kernel: the Triton function.
        grid: programs along each axis.
        signature: type of each parameter in Triton's notation, by name.
        aligned: parameters that are multiples of 16, as tensors' addresses always are.
        constants: values of the ``constexpr`` parameters, by name.
        options: ``num_warps`` and ``num_stages``.
    """

    kernel: Any
    grid: tuple[int, ...]
    signature: dict[str, str]
    aligned: frozenset[str]
    constants: dict[str, Any]
    options: dict[str, int]

    @property
    def oldest_sm(self) -> int:
        """The first GPU that has the number formats of the parameters."""
        return max(_OLDEST_SM.get(kind, 80) for kind in self.signature.values())


def record(sm: int, function: Callable[..., object], *args: Any, **kwargs: Any) -> list[Launch]:
    """Call what launches kernels, and return the launches for the GPU ``sm`` instead.

    Tensors may be on ``meta``.
    """
    launches = []

    def note(
        kernel: Any, grid: tuple[int, ...], values: tuple[Any, ...], meta: dict[str, Any]
    ) -> None:
        named = dict(zip(kernel.arg_names, values, strict=False))
        constants = {name: value for name, value in meta.items() if name not in _COMPILER}
        signature = {name: _type(value) for name, value in named.items()}
        launches.append(
            Launch(
                kernel=kernel,
                grid=grid,
                signature={n: signature.get(n, "constexpr") for n in kernel.arg_names},
                aligned=frozenset(name for name, value in named.items() if _is_aligned(value)),
                constants=constants,
                options={name: meta[name] for name in _COMPILER if name in meta},
            )
        )

    with capture_launches(note, sm):
        function(*args, **kwargs)
    return launches


def _is_aligned(value: object) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)


def _type(value: object) -> str:
    match value:
        case Tensor():
            if value.dtype not in _POINTERS:
                known = ", ".join(str(dtype) for dtype in _POINTERS)
                raise TypeError(f"a kernel takes tensors of {known}, not of {value.dtype}")
            return _POINTERS[value.dtype]
        case int():
            return "i32"
        case float():
            return "fp32"
    raise TypeError(f"a kernel takes tensors and numbers, not {type(value).__name__}")


def compile_for(launch: Launch, sm: int) -> Any:
    """Compile a launch for one GPU, which Triton calls by its ``sm``, such as 90.

    Returns:
        Triton's compiled kernel: ``asm`` holds ``ptx`` and ``cubin``, ``metadata`` the rest.

    Raises:
        triton.CompilationError: the kernel cannot be compiled for it.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # Without knowing what is aligned, each load is of one number.
    aligned = (i for i, name in enumerate(launch.signature) if name in launch.aligned)
    source = ASTSource(
        launch.kernel,
        launch.signature,
        constexprs=launch.constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=launch.options)


def resources(compiled: Any) -> dict[str, int]:
    """Registers and bytes of stack of each thread, and bytes of shared memory, of a kernel."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        listing = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    usage = {name: int(number) for name, number in re.findall(r"(REG|STACK):(\d+)", listing)}
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "shared": compiled.metadata.shared,
    }


def launches_of_wan(sm: int) -> Iterator[tuple[str, Launch]]:
    """Every kernel as the networks of 1.3B and 14B launch it on a GPU, with a name for each."""
    from wanx.kernels.adaln import launch_adaln
    from wanx.kernels.attention.eight_bit import launch_attention_8bit
    from wanx.kernels.attention.flash import launch_attention
    from wanx.kernels.gated_residual import launch_gated_residual
    from wanx.kernels.gemm_8bit import launch_gemm_8bit
    from wanx.kernels.quantize import launch_quantize
    from wanx.kernels.rms_norm import launch_rms_norm
    from wanx.kernels.rms_norm_rope import launch_rms_norm_rope

    fp8, int8, bf16 = torch.float8_e4m3fn, torch.int8, torch.bfloat16
    scalar, length = _meta(), 32760  # no multiple of 16, so none is taken for granted
    for dim, ffn, heads in ((1536, 8960, 12), (5120, 13824, 40)):
        x, z, wide = _meta(1, length, dim), _meta(1, length, dim, dtype=bf16), _meta(1, length, ffn)
        row, weight, table = _meta(1, 1, dim), _meta(dim), _meta(length, dim // heads // 2)
        updated = {"z": z, "gate": row}
        calls: list[tuple[str, Callable[..., object], tuple[Any, ...], dict[str, Any]]] = [
            ("adaln", launch_adaln, (x, row, row, 1e-6), {"dtype": bf16}),
            ("adaln, fp8", launch_adaln, (x, row, row, 1e-6), {"dtype": fp8, "q_scale": scalar}),
            ("adaln, int8", launch_adaln, (x, row, row, 1e-6), {"dtype": int8, "q_scale": scalar}),
            ("adaln, fp8 rows", launch_adaln, (x, row, row, 1e-6), {"dtype": fp8, "by_row": True}),
            ("residual_adaln", launch_adaln, (x, row, row, 1e-6), {"dtype": bf16, **updated}),
            (
                "residual_adaln, fp8",
                launch_adaln,
                (x, row, row, 1e-6),
                {"dtype": fp8, "q_scale": scalar, **updated},
            ),
            ("gated_residual", launch_gated_residual, (x, z, row), {}),
            ("rms_norm", launch_rms_norm, (z, weight, 1e-6), {}),
            (
                "rms_norm_rope",
                launch_rms_norm_rope,
                (z, z, weight, weight, table, table, heads, 1e-6),
                {},
            ),
            (
                "rms_norm_rope, fp8",
                launch_rms_norm_rope,
                (z, z, weight, weight, table, table, heads, 1e-6, (scalar, scalar)),
                {},
            ),
            ("attention", launch_attention, (z, z, z, heads, 0.088), {}),
            ("attention, 8 bits", launch_attention_8bit, (z, z, z, heads, 0.088), {}),
            ("quantize, fp8", launch_quantize, (z, scalar, fp8), {}),
            ("quantize, fp8 rows", launch_quantize, (z, None, fp8), {}),
            ("gelu_quantize, fp8", launch_quantize, (wide, scalar, fp8), {"gelu": True}),
            ("gelu_quantize, int8", launch_quantize, (wide, scalar, int8), {"gelu": True}),
            ("gelu_quantize, fp8 rows", launch_quantize, (wide, None, fp8), {"gelu": True}),
        ]
        for name, kind, x_scale in (("int8", int8, scalar), ("fp8 rows", fp8, _meta(length))):
            layer = (_meta(dim, dim, dtype=kind), weight, weight.bfloat16())
            args = (_meta(length, dim, dtype=kind), x_scale, *layer)
            calls.append((f"quant_linear, {name}", launch_gemm_8bit, args, {}))
        for name, kind in (("int8", int8), ("fp8", fp8)):
            first = (_meta(ffn, dim, dtype=kind), _meta(ffn), _meta(ffn, dtype=bf16))
            args = (_meta(length, dim, dtype=kind), scalar, *first)
            gelu = {"out_scale": scalar, "dtype": kind}
            calls.append((f"quant_linear_gelu, {name}", launch_gemm_8bit, args, gelu))
            last = (_meta(dim, ffn, dtype=kind), weight, weight.bfloat16())
            args = (_meta(length, ffn, dtype=kind), scalar, *last)
            update = {"residual": x, "gate": row}
            calls.append((f"quant_linear_residual, {name}", launch_gemm_8bit, args, update))
        for name, function, args, kwargs in calls:
            for launch in record(sm, function, *args, **kwargs):
                yield f"{name}, D={dim}", launch


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def main() -> None:
    """Compile everything and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sm", type=int, action="append", help="such as 90; repeat for several")
    sms = parser.parse_args().sm or KNOWN_SM
    if unknown := [sm for sm in sms if sm not in KNOWN_SM]:
        known = ", ".join(map(str, KNOWN_SM))
        print(f"error: there is nothing for SM {unknown[0]}; known are {known}", file=sys.stderr)
        sys.exit(UsageError.exit_code)
    print(f"{'kernel':40} sm  registers  stack  shared")
    spilled = 0
    for sm in sms:
        for name, launch in launches_of_wan(sm):
            if sm >= launch.oldest_sm:
                used = resources(compile_for(launch, sm))
                spilled += used["stack"] > SPILL_BYTES
                print(
                    f"{name:40} {sm:3} {used['registers']:9} {used['stack']:6} {used['shared']:7}"
                )
    if spilled:
        sys.exit(f"{spilled} kernels spill registers to memory")


if __name__ == "__main__":
    main()
