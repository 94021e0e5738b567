from __future__ import annotations

import os
import subprocess
import sys

import pytest

from wanx.kernels.ahead import KNOWN_SM


@pytest.mark.parametrize("sm", KNOWN_SM)
def test_every_kernel_compiles(sm: int) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "wanx.kernels.ahead", "--sm", str(sm)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()[1:]
    kernels = {row.partition(", D=")[0] for row in rows}
    assert {"adaln", "residual_adaln", "gated_residual", "rms_norm_rope", "attention"} <= kernels
    fp8 = {"adaln, fp8", "gelu_quantize, fp8 rows", "rms_norm_rope, fp8"}
    assert fp8 <= kernels if sm >= 89 else fp8.isdisjoint(kernels)
