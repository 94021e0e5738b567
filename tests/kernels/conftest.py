"""Runs the ONNX function of an op in ONNX Runtime, and the checks that every op has to pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.support.interpreter import DEVICE, patch_interpreter
from tests.support.onnx_runs import run_function
from wanx.kernels.launch import capture_launches, sm_of
from wanx.kernels.registry import NODES

patch_interpreter()

# Largest relative error of rounding to nearest.
ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
GUARD = 64  # elements on both sides of a tensor; keeps it aligned as kernels like it


@pytest.fixture
def run_onnx() -> Callable[..., list[Tensor]]:
    return run_function


@pytest.fixture
def assert_rounded_once() -> Callable[[Tensor, Tensor], None]:
    """Check that ``out`` is the exact result, off by fp32 arithmetic and one rounding at most."""

    def check(out: Tensor, exact: Tensor) -> None:
        assert exact.dtype == torch.float64
        rms = exact.square().mean().sqrt()
        allowed = ROUNDOFF[out.dtype] * exact.abs() + 1e-5 * rms
        excess = (out.double() - exact).abs() - allowed
        assert excess.max() <= 0, f"{excess.max() / rms:.2e} RMS beyond one rounding"

    return check


def _nearest(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 once to 8 bits, ties to even; the result stays float64."""
    if dtype == torch.int8:
        return exact.round().clamp(-128, 127)
    exponent = torch.frexp(exact).exponent - 1
    step = torch.ldexp(torch.ones_like(exact), exponent.clamp_min(-6) - 3)
    return ((exact / step).round() * step).clamp(-448, 448)


@pytest.fixture
def assert_rounded_to_8bit() -> Callable[[Tensor, Tensor], None]:
    """Check that 8-bit ``q`` is the rounded exact result, but for a step where fp32 erred."""

    def check(q: Tensor, exact: Tensor) -> None:
        assert exact.dtype == torch.float64
        assert q.shape == exact.shape
        every = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).view(q.dtype).double()
        codes = every[every.isfinite()].unique()
        wanted, found = _nearest(exact, q.dtype), q.double()
        assert found.isfinite().all()
        steps = torch.searchsorted(codes, found) - torch.searchsorted(codes, wanted)
        assert steps.abs().max() <= 1
        wrong = int((steps != 0).sum())
        # One of few may lie next to a tie, where the last bit of fp32 is the processor's.
        assert wrong <= max(1, 0.005 * steps.numel()), f"{wrong} are not rounded correctly"

    return check


def _run_kernel(launch: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a launch function on the GPU or in the interpreter; return its results on the CPU.

    Every tensor lies among NaNs, and results are NaN before: a kernel that reads or writes beside
    a tensor, or leaves a result out, is found out. int8 has -1 in their place.
    """
    args, kwargs = tree_map_only(Tensor, lambda t: t.to(DEVICE), (args, kwargs))
    given = {id(leaf) for leaf in tree_leaves((args, kwargs))}

    def run(kernel: Any, grid: tuple[int, ...], values: tuple[Any, ...], meta: Any) -> None:
        tensors = {id(value): value for value in values if isinstance(value, Tensor)}
        buffers, inner = {}, {}
        for key, tensor in tensors.items():
            sizes = zip(tensor.shape, tensor.stride(), strict=True)
            extent = 1 + sum((size - 1) * stride for size, stride in sizes) + 2 * GUARD
            raw = torch.full((extent * tensor.itemsize,), 255, dtype=torch.uint8, device=DEVICE)
            buffers[key] = raw.view(tensor.dtype)
            inner[key] = buffers[key].as_strided(tensor.shape, tensor.stride(), GUARD)
            if key in given:
                inner[key].copy_(tensor)
        allowed = {key: buffer.clone() for key, buffer in buffers.items()}
        kernel[grid](*(inner.get(id(value), value) for value in values), **meta)
        for key in tensors.keys() - given:
            tensors[key].copy_(inner[key])
            allowed[key].as_strided(inner[key].shape, inner[key].stride(), GUARD).copy_(inner[key])
        for key, buffer in buffers.items():
            assert torch.equal(buffer.view(torch.uint8), allowed[key].view(torch.uint8))

    with capture_launches(run, sm_of(torch.empty(0, device=DEVICE))):
        return tree_map_only(Tensor, lambda t: t.cpu(), launch(*args, **kwargs))


@pytest.fixture
def run_kernel() -> Callable[..., Any]:
    return _run_kernel


@pytest.fixture
def check_op() -> Callable[..., None]:
    """Check what the seam promises of an op: schema, fake, ONNX function, forward and backward."""

    def check(
        overload: Any,
        arguments: tuple[Any, ...],
        public: Callable[..., Any],
        formula: Callable[..., Any],
    ) -> None:
        torch.library.opcheck(overload, arguments)
        assert overload in NODES
        out = overload(*arguments)
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        for index in range(len(tensors)):
            # One input at a time: a frozen network may need the gradient of any single one.
            leaf = tensors[index].clone().requires_grad_()
            inputs = [*tensors[:index], leaf, *tensors[index + 1 :]]
            differentiable = public(*inputs)
            torch.testing.assert_close(differentiable, out)
            _total(differentiable).backward()
            exact = tensors[index].double().requires_grad_()
            doubles = [t.double() for t in tensors]
            _total(formula(*doubles[:index], exact, *doubles[index + 1 :])).backward()
            assert leaf.grad is not None
            assert exact.grad is not None
            torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            frozen = public(*(t.clone().requires_grad_() for t in tensors))
        torch.testing.assert_close(frozen, out)

    return check


def _total(out: Any) -> Tensor:
    """A scalar whose gradient reaches every element differently."""
    parts = out if isinstance(out, tuple) else (out,)
    return sum(
        (part * torch.linspace(-1, 1, part.numel(), dtype=part.dtype).view_as(part)).sum()
        for part in parts
    )
