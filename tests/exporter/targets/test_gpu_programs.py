"""What a denoiser's programs run on a GPU, traced for one on fake tensors.

Everything but the compilation happens here as it does there: the choice of kernels, their shapes
and strides, and that no choice ties a program to the size that it was traced with.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.support.paths import ROOT

SCRIPT = ROOT / "tests" / "support" / "gpu_programs.py"
NORMS = {"_rms_norm_rope_kernel": 1, "_rms_norm_kernel": 2}
STATIC = NORMS | {"_adaln_kernel": 3, "_gated_residual_kernel": 1}
ROUNDING = {"_round_rows_kernel": 2, "_round_values_kernel": 1, "_attention_8bit_kernel": 1}
Ran = Callable[[str, int], dict[str, int]]


@pytest.fixture(scope="module")
def ran() -> Ran:
    """Kernels and products of one block, by case and GPU."""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return lambda case, sm: found[f"{case} {sm}"]


def require(found: dict[str, int], wanted: dict[str, int]) -> None:
    assert isinstance(found, dict), found
    kernels = {name: n for name, n in found.items() if name.endswith("_kernel")}
    products = {name: n for name, n in found.items() if name in ("linear", "_scaled_mm")}
    others = {name: n for name, n in found.items() if "dot_product" in name}
    assert kernels | products | others == wanted
    assert not [name for name in found if "wanx" in name]
    assert found["free_axes"] == 2


def attention(sm: int, count: int) -> dict[str, int]:
    """In 16 bits the first choice is one of PyTorch's kernels."""
    name = "cudnn" if sm >= 90 else "flash"
    return {f"_scaled_dot_product_{name}_attention": count}


@pytest.mark.parametrize("sm", [80, 90, 120])
def test_sixteen_bits(ran: Ran, sm: int) -> None:
    require(ran("bf16", sm), STATIC | attention(sm, 2) | {"linear": 8})


@pytest.mark.parametrize("sm", [80, 90, 120])
def test_images(ran: Ran, sm: int) -> None:
    wanted = STATIC | attention(sm, 3) | {"_rms_norm_kernel": 3, "linear": 10}
    require(ran("images", sm), wanted)


@pytest.mark.parametrize("sm", [80, 90, 120])
def test_int8(ran: Ran, sm: int) -> None:
    """Products of our own take in the GELU and the last residual."""
    wanted = NORMS | {"_adaln_kernel": 3, "_quantize_kernel": 4, "_gemm_8bit_kernel": 8}
    require(ran("int8", sm), wanted | attention(sm, 2))


@pytest.mark.parametrize("sm", [90, 120])
def test_fp8(ran: Ran, sm: int) -> None:
    products = {"_quantize_kernel": 5, "_scaled_mm": 8}
    require(ran("fp8", sm), STATIC | ROUNDING | attention(sm, 1) | products)


@pytest.mark.parametrize("sm", [90, 120])
def test_a_scale_for_each_token(ran: Ran, sm: int) -> None:
    kernels = {"_adaln_kernel": 3, "_gated_residual_kernel": 3, "_quantize_kernel": 5}
    require(ran("rows", sm), NORMS | attention(sm, 2) | kernels | {"_scaled_mm": 8})


def test_a_gpu_without_fp8(ran: Ran) -> None:
    assert "FP8 needs SM89 or newer, this GPU is SM80" in str(ran("fp8", 80))
