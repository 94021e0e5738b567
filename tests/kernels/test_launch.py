from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wanx.errors import WanxError
from wanx.kernels import launch
from wanx.kernels.adaln import unsupported_reason as adaln_reason
from wanx.kernels.aot_compile import record
from wanx.kernels.gated_residual import unsupported_reason as gated_residual_reason
from wanx.kernels.quantize import launch_quantize
from wanx.kernels.quantize import unsupported_reason as quantize_reason
from wanx.kernels.rms_norm import unsupported_reason as rms_norm_reason
from wanx.kernels.rms_norm_rope import unsupported_reason as rope_reason

FP32 = torch.float32


def on_gpu(
    *shape: int, dtype: torch.dtype = torch.bfloat16, stride: int = 1, contiguous: bool = True
) -> Any:
    """What the checks look at of a tensor on a GPU, which this machine may not have."""
    return SimpleNamespace(
        device=torch.device("cuda:0"), is_cuda=True, dtype=dtype, shape=torch.Size(shape),
        ndim=len(shape), stride=lambda _=-1: stride, is_contiguous=lambda: contiguous,
        numel=lambda: torch.Size(shape).numel(),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))


def test_what_runs() -> None:
    assert launch.unsupported_tensors(on_gpu(2, 8), on_gpu(8), fp8=True) is None


@pytest.mark.parametrize(
    ("found", "fp8", "message"),
    [((7, 5), False, "SM80 or newer, this GPU is SM75"), ((8, 6), True, "FP8 needs SM89")],
)
def test_old_gpus(
    found: tuple[int, int], fp8: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: found)
    assert message in (launch.unsupported_tensors(on_gpu(2, 8), fp8=fp8) or "")


def test_tensors_that_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.empty(2, 8)
    assert "cpu and cuda:0" in (launch.unsupported_tensors(cpu, on_gpu(2, 8)) or "")
    assert "not on cpu" in (launch.unsupported_tensors(cpu) or "")
    assert "stride 3" in (launch.unsupported_tensors(on_gpu(2, 8, stride=3)) or "")
    assert "float64" in (quantize_reason(on_gpu(2, 8, dtype=torch.float64), fp8=False) or "")
    assert "20000" in (quantize_reason(on_gpu(2, 20000), fp8=False) or "")
    for scale in (on_gpu(2, dtype=FP32), on_gpu()):
        assert "no scalar in fp32" in (quantize_reason(on_gpu(2, 8), scale, fp8=False) or "")
    assert "[4] does not" in (rms_norm_reason(on_gpu(2, 8), on_gpu(4)) or "")
    monkeypatch.setattr(launch, "tl", None)
    assert "pip install 'wanx[gpu]'" in (launch.unsupported_tensors(on_gpu(2, 8)) or "")


def test_tensors_that_adaln_would_misread() -> None:
    x, z, step = on_gpu(2, 5, 24), on_gpu(2, 5, 24), on_gpu(dtype=FP32)
    row, shared = on_gpu(2, 1, 24, dtype=FP32), on_gpu(1, 1, 24, dtype=FP32)
    assert adaln_reason(x, row, shared, row, z=z, q_scale=step) is None
    assert gated_residual_reason(x, z, shared) is None
    for wrong in (
        on_gpu(2, 5, 24, dtype=FP32), on_gpu(2, 1, 24), on_gpu(3, 1, 24, dtype=FP32),
        on_gpu(dtype=FP32),
    ):  # fmt: skip
        message = f"{wrong.dtype} {list(wrong.shape)} does not belong to x [2, 5, 24]"
        assert message in (adaln_reason(x, row, wrong, row, z=z) or "")
        assert message in (gated_residual_reason(x, z, wrong) or "")
    for wrong in (row, on_gpu(2, 4, 24)):
        assert f"z {wrong.dtype}" in (adaln_reason(x, row, row, row, z=wrong) or "")
    assert "no scalar in fp32" in (adaln_reason(x, row, row, q_scale=row) or "")
    assert "z [2, 5, 24] is not" in (
        adaln_reason(x, row, row, row, z=on_gpu(2, 5, 24, contiguous=False)) or ""
    )


def test_tensors_that_rms_norm_rope_would_misread() -> None:
    q, weight, table = on_gpu(2, 5, 96), on_gpu(96), on_gpu(5, 8, dtype=FP32)
    step = on_gpu(dtype=FP32)
    right = [weight, on_gpu(96, dtype=FP32), table, table, step, step]

    def reason(place: int, wrong: Any) -> str:
        others = [*right[:place], wrong, *right[place + 1 :]]
        return rope_reason(q, q, *others, num_heads=6) or ""

    assert rope_reason(q, q, *right, num_heads=6) is None
    assert rope_reason(q, q, *right[:4], num_heads=6) is None
    for place, name, wrong in (
        (0, "q_weight", on_gpu(16)), (1, "k_weight", on_gpu(96, dtype=torch.float64)),
        (2, "cos", on_gpu(5, 8)), (2, "cos", on_gpu(4, 8, dtype=FP32)),
        (3, "sin", on_gpu(5, 16, dtype=FP32)), (3, "sin", on_gpu(1, 5, 8, dtype=FP32)),
    ):  # fmt: skip
        message = f"{name} {wrong.dtype} {list(wrong.shape)} does not belong to q [2, 5, 96]"
        assert message in reason(place, wrong)
    assert "sin [5, 8] is not contiguous" in reason(3, on_gpu(5, 8, dtype=FP32, contiguous=False))
    assert "a scale torch.bfloat16 [] is no scalar in fp32" in reason(4, on_gpu())
    assert "[6] is no scalar" in reason(5, on_gpu(6, dtype=FP32))
    for heads in (4, 12, 5):
        assert f"96 channels are not {heads} heads" in (
            rope_reason(q, q, *right, num_heads=heads) or ""
        )


def test_a_reference_instead_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    launch._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="wanx.kernels"):
        assert launch.runs_reference("adaln", "no reason", torch.empty(1))
        assert not caplog.records  # the processor has no kernels
        assert not launch.runs_reference("adaln", None, on_gpu(1))
        for _ in range(2):
            assert launch.runs_reference("adaln", "x is odd", on_gpu(1))
    assert [record.getMessage() for record in caplog.records] == [
        "wanx::adaln runs as PyTorch operators, which is slower: x is odd"
    ]


def test_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANX_STRICT", "1")
    with pytest.raises(WanxError, match=r"wanx::adaln cannot run: x is odd; unset WANX_STRICT"):
        launch.runs_reference("adaln", "x is odd", on_gpu(1))
    assert launch.runs_reference("adaln", "x is odd", torch.empty(1))


def test_captured_launches() -> None:
    x = torch.empty(3, 40, dtype=torch.bfloat16, device="meta")
    (found,) = record(80, launch_quantize, x, None, torch.float8_e4m3fn)
    assert found.signature["x"] == "*bf16"
    assert found.signature["out"] == "*fp8e4nv"
    assert found.signature["K"] == "constexpr"
    assert (found.grid, found.constants["K"], found.oldest_sm) == ((3,), 40, 89)
    assert found.aligned >= {"x", "out"}
    for wrong, message in (("x", "not str"), (x.double(), "bfloat16.* not of torch.float64")):
        with pytest.raises(TypeError, match=message):
            record(80, lambda wrong=wrong: launch.launch(found.kernel, (1,), wrong))
    assert launch._on_launch is None


def test_captures_within_each_other() -> None:
    told: list[str] = []
    x = torch.empty(3, 40, device="meta")

    def tell(name: str) -> Callable[..., None]:
        return lambda *_: told.append(f"{name} {launch.sm_of(x)}")

    with launch.capture_launches(tell("outer"), 80):
        with launch.capture_launches(tell("inner"), 100):
            launch_quantize(x, None, torch.int8)
        launch_quantize(x, None, torch.int8)
    assert told == ["inner 100", "outer 80"]
    assert launch.sm_of(x) == 90


def test_everything_imports_and_runs_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from wanx.kernels import aot_compile, gelu_quantize, residual_adaln, rms_norm_rope_quantize
from wanx.kernels.attention import op
x = torch.ones(1, 3, 16)
print(residual_adaln.residual_adaln(x, x, x[:, :1], x[:, :1], x[:, :1], eps=1e-6)[0].sum().item())
print(gelu_quantize.gelu_quantize(x, torch.tensor(0.1), torch.int8).sum().item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["96.0", str(48 * 8)]
    assert "Triton" not in done.stderr
