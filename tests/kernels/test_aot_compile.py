from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from wanx.kernels.aot_compile import KNOWN_SM, main

SHARED_KIB = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # of a block of threads
COMPILED = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


@pytest.mark.parametrize("sm", KNOWN_SM)
def test_every_kernel_compiles(sm: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "wanx.kernels.aot_compile", "--sm", str(sm)],
        capture_output=True,
        text=True,
        env=COMPILED,
    )
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()[1:]
    kernels = {row.partition(", D=")[0] for row in rows}
    assert {"adaln", "residual_adaln", "gated_residual", "rms_norm_rope", "attention"} <= kernels
    fp8 = {"adaln, fp8", "gelu_quantize, fp8 rows", "rms_norm_rope, fp8"}
    assert fp8 <= kernels if sm >= 89 else fp8.isdisjoint(kernels)
    stacks = [int(row.split()[-2]) for row in rows if row.startswith("attention, 8 bits")]
    assert not any(stacks)
    assert max(int(row.split()[-1]) for row in rows) <= SHARED_KIB[sm] * 1024


def test_attention_of_wide_heads_fits_shared_memory() -> None:
    code = """
import torch
from wanx.kernels.aot_compile import compile_for, record
from wanx.kernels.attention.flash import launch_attention
x = torch.empty(1, 2000, 512, dtype=torch.bfloat16, device="meta")
for sm in (80, 89, 90, 100):
    (launch,) = record(sm, launch_attention, x, x, x, 2, 0.0625)
    print(sm, compile_for(launch, sm).metadata.shared)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=COMPILED, check=True
    )
    used = [map(int, line.split()) for line in done.stdout.splitlines()]
    assert len(used) == 4
    assert all(shared <= SHARED_KIB[sm] * 1024 for sm, shared in used)


def test_tma_moves_the_blocks_of_attention() -> None:
    """Queries, keys, values and the result, without spills; specialised warps are added to others.

    PyTorch's programs allocate the memory of the descriptors, on 128 bytes.
    """
    code = """
import json
import torch
from wanx.kernels.aot_compile import compile_for, record, resources
from wanx.kernels.attention.eight_bit import launch_attention_8bit
from wanx.kernels.attention.flash import launch_attention
from wanx.kernels.launch_config import config, with_config
x = torch.empty(1, 32760, 1536, dtype=torch.bfloat16, device="meta")
kernels = {"attention": launch_attention, "attention_8bit": launch_attention_8bit}
for op, sm, asked in (
    ("attention", 90, {"BLOCK_K": 64}),
    ("attention", 90, {"WARP_SPECIALIZE": 1, "num_warps": 4, "BLOCK_K": 64}),
    ("attention", 100, {"WARP_SPECIALIZE": 1, "BLOCK_K": 64}),
    ("attention_8bit", 90, {"WARP_SPECIALIZE": 1, "num_warps": 4, "BLOCK_K": 64}),
):
    choice = config(op, sm, head=128) | {"TMA": 1} | asked
    with with_config(op, choice):
        compiled = compile_for(record(sm, kernels[op], x, x, x, 12, 0.088)[-1], sm)
    ptx, metadata = compiled.asm["ptx"], compiled.metadata
    found = resources(compiled) | {
        "op": op, "sm": sm, "asked": choice,
        "loads": ptx.count("cp.async.bulk.tensor.2d.shared"),
        "stores": ptx.count("cp.async.bulk.tensor.2d.global"),
        "setmaxnreg": ptx.count("setmaxnreg"), "num_warps": metadata.num_warps,
        "scratch": metadata.global_scratch_size, "alignment": metadata.global_scratch_align,
    }
    print(json.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=COMPILED
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 4
    for found in rows:
        assert found["loads"] >= 3, found
        assert found["stores"] >= 1, found
        assert found["stack"] == 0, found
        assert found["shared"] <= SHARED_KIB[found["sm"]] * 1024
        assert found["scratch"] >= 4 * 128
        assert found["alignment"] <= 256
        specialized = found["asked"]["WARP_SPECIALIZE"] == 1
        assert (found["num_warps"] > found["asked"]["num_warps"]) is specialized
        assert (found["setmaxnreg"] > 0) is specialized


def test_scalars_in_fp64_are_computed_with_in_fp32() -> None:
    """From PyTorch 2.11 on, compiled programs pass Python's floats to kernels as fp64."""
    code = """
import re
from dataclasses import replace
from wanx.kernels.aot_compile import compile_for, launches_of_wan
for name, launch in launches_of_wan(90):
    scalars = {n: "fp64" for n, kind in launch.signature.items() if kind == "fp32"}
    if "D=1536" in name and scalars:
        compiled = compile_for(replace(launch, signature=launch.signature | scalars), 90)
        wide = re.findall(r"(?:add|mul|fma|div|sqrt|ex2)\\S*\\.f64", compiled.asm["ptx"])
        print(name, len(wide), sep="|")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=COMPILED
    )
    assert done.returncode == 0, done.stderr
    counts = dict(line.rsplit("|", 1) for line in done.stdout.splitlines())
    kernels = {name.partition(",")[0] for name in counts}
    assert {"adaln", "residual_adaln", "rms_norm", "rms_norm_rope", "attention"} <= kernels
    assert set(counts.values()) == {"0"}


def test_an_unknown_gpu_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ahead", "--sm", "90", "--sm", "75"])
    with pytest.raises(SystemExit) as ending:
        main()
    assert ending.value.code == 2
    out, said = capsys.readouterr()
    assert out == ""
    assert said == "error: there is nothing for SM 75; known are 80, 89, 90, 100, 120\n"
