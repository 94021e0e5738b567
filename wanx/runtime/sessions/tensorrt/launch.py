"""Launcher of a kernel embedded in a TensorRT plan, through CUDA's driver."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from wanx.bundle.plugin_kernel import PluginKernel, Pointer, Real, Variant
from wanx.errors import EnvironmentMismatchError, WanxError

# Triton adds two pointers to every kernel, to memory that ours do not use.
HIDDEN = 2
ALIGNED = 16  # what kernels are compiled for
_PLAIN_SHARED = 48 << 10  # what a kernel has without asking for more
_functions: dict[tuple[int, str], Any] = {}


def cuda_driver() -> Any:
    """Import CUDA's driver, through cuda-python.

    Raises:
        EnvironmentMismatchError: it is not installed.
    """
    try:
        return import_module("cuda.bindings.driver")
    except ImportError:
        raise EnvironmentMismatchError(
            "the engine has kernels that cuda-python launches, which is not installed: pip "
            "install cuda-bindings, or build the engine with --plugins none"
        ) from None


class Launcher:
    """Launches one kernel on the GPU whose context is current.

    Everything is prepared by :meth:`set_shapes`, so that :meth:`launch` may be captured into a CUDA
    graph.
    """

    def __init__(self, kernel: PluginKernel, driver: Any = None) -> None:
        """Launch ``kernel`` through ``driver``, by default :func:`cuda_driver`, asked for late."""
        self._kernel = kernel
        self._driver = driver
        self._variant: Variant | None = None
        self._function: Any = None
        self._grid: tuple[int, ...] = ()
        self._pointers: list[tuple[int, Pointer]] = []

    def load(self) -> None:
        """Load the kernel, unless this process has loaded it for this context.

        Raises:
            EnvironmentMismatchError: the plan has no kernel for this GPU, or nothing to launch it.
            WanxError: the driver refuses it.
        """
        self._driver = self._driver or cuda_driver()
        cu = self._driver
        context = int(_ok(cu, "cuCtxGetCurrent", cu.cuCtxGetCurrent()))
        if not context:
            raise WanxError("TensorRT has not opened a GPU for its plug-ins")
        device = _ok(cu, "cuCtxGetDevice", cu.cuCtxGetDevice())
        self._variant, binary = self._kernel.variant_for(_sm(cu, device))
        key = (context, hashlib.sha256(binary).hexdigest())
        if key not in _functions:
            _functions[key] = self._loaded(self._variant, binary)
        self._function = _functions[key]
        self._prepare(self._variant)

    def _loaded(self, variant: Variant, binary: bytes) -> Any:
        cu = self._driver
        module = _ok(cu, "cuModuleLoadData", cu.cuModuleLoadData(binary))
        name = variant.function.encode()
        function = _ok(cu, "cuModuleGetFunction", cu.cuModuleGetFunction(module, name))
        if variant.shared > _PLAIN_SHARED:
            attribute = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            answer = cu.cuFuncSetAttribute(function, attribute, variant.shared)
            _ok(cu, "cuFuncSetAttribute", answer)
        return function

    def _prepare(self, variant: Variant) -> None:
        """Lay out the arguments: 8 bytes for each, and the addresses of those."""
        count = len(variant.arguments) + HIDDEN
        self._slots = (ctypes.c_uint64 * count)()
        start = ctypes.addressof(self._slots)
        self._addresses = (ctypes.c_void_p * count)(*(start + 8 * i for i in range(count)))
        self._pointers = []
        for index, argument in enumerate(variant.arguments):
            if isinstance(argument, Pointer):
                self._pointers.append((index, argument))
            elif isinstance(argument, Real):
                ctypes.c_float.from_buffer(self._slots, 8 * index).value = argument.real

    def set_shapes(self, shapes: Sequence[Sequence[int]]) -> None:
        """Prepare launches on inputs of these shapes.

        Raises:
            WanxError: the kernel was not made for them; or as :meth:`load`.
        """
        if self._variant is None:
            self.load()
        assert self._variant is not None
        axes = self._kernel.description.axes_at(shapes)
        self._grid = self._variant.grid_at(axes)
        for index, value in self._variant.integers_at(axes).items():
            ctypes.c_int32.from_buffer(self._slots, 8 * index).value = value

    def launch(self, tensors: Sequence[int], stream: int) -> None:
        """Launch on the addresses of inputs and outputs.

        Raises:
            WanxError: the driver refuses.
        """
        assert self._variant is not None
        if 0 in self._grid:
            return
        for index, pointer in self._pointers:
            address = tensors[pointer.tensor] + pointer.offset
            if address % ALIGNED:
                raise WanxError(f"a tensor lies at {address:#x}, no multiple of {ALIGNED} bytes")
            self._slots[index] = address
        cu = self._driver
        answer = cu.cuLaunchKernel(
            self._function, *self._grid, 32 * self._variant.warps, 1, 1, self._variant.shared,
            stream, ctypes.addressof(self._addresses), 0,
        )  # fmt: skip
        _ok(cu, "cuLaunchKernel", answer)


def _sm(cu: Any, device: Any) -> int:
    attributes = cu.CUdevice_attribute
    major, minor = (
        _ok(cu, "cuDeviceGetAttribute", cu.cuDeviceGetAttribute(attribute, device))
        for attribute in (
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    return int(10 * major + minor)


def _ok(cu: Any, call: str, answer: tuple[Any, ...]) -> Any:
    """Unpack a call's value, or raise for a code other than 0."""
    code, *values = answer
    if int(code) == 0:
        return values[0] if values else None
    _, name = cu.cuGetErrorName(code)
    text = name.decode() if isinstance(name, bytes) else str(name)
    raise WanxError(f"a kernel of the engine cannot run: {call} answers {text} ({int(code)})")
