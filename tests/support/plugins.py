"""Nodes that the TensorRT plug-in takes over, as cases of tests, and a driver that only listens."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from wanx.exporter.targets.tensorrt.ops import Spec

BF16, FP32 = torch.bfloat16, torch.float32
SCALAR = Spec(FP32, ())


@dataclass(frozen=True)
class Case:
    op: str
    inputs: tuple[Spec, ...]
    attributes: dict[str, Any]

    def shapes(self, batch: int, length: int) -> list[tuple[int, ...]]:
        sizes: dict[int | str, int] = {"B": batch, "L": length}
        return [tuple(sizes.get(n, n) for n in s.shape) for s in self.inputs]  # type: ignore[misc]


def _rope(dim: int, heads: int, *scales: Spec) -> tuple[tuple[Spec, ...], dict[str, Any]]:
    x, weight = Spec(BF16, ("B", "L", dim)), Spec(BF16, (dim,))
    table = Spec(FP32, ("L", dim // heads // 2))
    return (x, x, weight, weight, table, table, *scales), {"num_heads": heads, "eps": 1e-6}


def _adaln(dim: int, batch: int | str) -> tuple[Spec, ...]:
    modulation = Spec(FP32, (batch, 1, dim))
    return Spec(FP32, ("B", "L", dim)), modulation, modulation, SCALAR


CASES = {
    "rope": Case("RMSNormRope", *_rope(1536, 12)),
    "rope of 40 heads": Case("RMSNormRope", *_rope(5120, 40)),
    "rope, fp8": Case("RMSNormRopeQuantize", *_rope(1536, 12, SCALAR, SCALAR)),
    "gelu, fp8": Case("GeluQuantize", (Spec(BF16, ("B", "L", 8960)), SCALAR), {"dtype": 17}),
    "gelu, int8": Case("GeluQuantize", (Spec(BF16, ("B", "L", 504)), SCALAR), {"dtype": 3}),
    "adaln, fp8": Case("AdaLNQuantize", _adaln(1536, "B"), {"eps": 1e-6, "dtype": 17}),
    "adaln of a batch": Case("AdaLNQuantize", _adaln(1536, 1), {"eps": 1e-6, "dtype": 17}),
}


@dataclass
class ListeningDriver:
    """Answers as cuda-python's driver does, and keeps what a kernel would be launched with.

    Attributes:
        arguments: bytes of each argument of a launch, hidden ones included.
    """

    sm: int
    arguments: Sequence[int]
    context: int = 1
    failing: str | None = None
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    capturing: bool = False

    CUfunction_attribute = SimpleNamespace(
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared bytes"
    )
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major",
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor",
    )

    def _answer(self, *call: Any, gives: Any = None) -> tuple[Any, ...]:
        self.calls.append(call)
        return (700 if self.failing == call[0] else 0, gives)

    def cuGetErrorName(self, code: int) -> tuple[int, bytes]:
        return 0, b"CUDA_ERROR_SOMETHING"

    def cuCtxGetCurrent(self) -> tuple[Any, ...]:
        return self._answer("cuCtxGetCurrent", gives=self.context)

    def cuCtxGetDevice(self) -> tuple[Any, ...]:
        return self._answer("cuCtxGetDevice", gives=0)

    def cuDeviceGetAttribute(self, attribute: str, device: int) -> tuple[Any, ...]:
        number = self.sm // 10 if attribute == "major" else self.sm % 10
        return self._answer("cuDeviceGetAttribute", gives=number)

    def cuModuleLoadData(self, image: bytes) -> tuple[Any, ...]:
        assert not self.capturing, "a stream that is captured loads no code"
        return self._answer("cuModuleLoadData", image, gives="module")

    def cuModuleGetFunction(self, module: str, name: bytes) -> tuple[Any, ...]:
        return self._answer("cuModuleGetFunction", module, name, gives="function")

    def cuFuncSetAttribute(self, *arguments: Any) -> tuple[Any, ...]:
        return self._answer("cuFuncSetAttribute", *arguments)

    def cuLaunchKernel(self, *arguments: Any) -> tuple[Any, ...]:
        *launch, addresses, extra = arguments
        count = len(self.arguments)
        places = (ctypes.c_void_p * count).from_address(addresses)
        values = [
            ctypes.string_at(place, size)
            for place, size in zip(places, self.arguments, strict=True)
        ]
        return self._answer("cuLaunchKernel", *launch, values, extra)
