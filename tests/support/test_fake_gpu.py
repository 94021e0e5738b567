"""The simulated GPU has the calls of the real modules, with their arguments and results."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from importlib.util import find_spec
from typing import Any, get_args, get_type_hints

import pytest
import torch

from tests.support import fake_gpu
from tests.support.fake_gpu import FakeCuda

CALLS = [name for name in vars(FakeCuda) if name.startswith("cuda") and name[4].isupper()]
FUNCTIONS = [name for name in CALLS if callable(getattr(FakeCuda, name))]
needs_cuda_python = pytest.mark.skipif(
    find_spec("cuda") is None, reason="cuda-python is not installed"
)
needs_rtx = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed"
)
# What the real modules call the classes of the simulated one, and what only serves tests.
CLASSES = {
    "Runtime": "Runtime",
    "Engine": "ICudaEngine",
    "Config": "IRuntimeConfig",
    "Cache": "IRuntimeCache",
    "Context": "IExecutionContext",
}
OURS = {"scratch"}


@needs_cuda_python
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which would do it")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_calls_of_cuda(name: str) -> None:
    """Without a driver a call fails in the library, after its arguments were taken."""
    cuda: Any = import_module("cuda.bindings.runtime")
    fake = getattr(FakeCuda, name)
    given = {
        "kind": cuda.cudaMemcpyKind.cudaMemcpyHostToDevice,
        "mode": cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal,
        "attribute": cuda.cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor,
        "code": cuda.cudaError_t.cudaErrorUnknown,
    }
    names = [n for n in inspect.signature(fake).parameters if n != "self"]
    found = getattr(cuda, name)(*(given.get(n, 0) for n in names))
    assert len(found) == len(get_args(get_type_hints(fake)["return"]))
    assert isinstance(found[0], cuda.cudaError_t)


@needs_cuda_python
def test_constants_of_cuda() -> None:
    cuda: Any = import_module("cuda.bindings.runtime")
    assert cuda.cudaStreamNonBlocking == FakeCuda.cudaStreamNonBlocking
    for name in set(CALLS) - set(FUNCTIONS) - {"cudaStreamNonBlocking"}:
        for member, value in vars(getattr(FakeCuda, name)).items():
            assert int(getattr(getattr(cuda, name), member)) == value or name == "cudaDeviceAttr"


@needs_rtx
@pytest.mark.parametrize("name", CLASSES)
def test_methods_of_tensorrt(name: str) -> None:
    """Each takes as many arguments as one of its real forms."""
    trt: Any = import_module("tensorrt_rtx")
    real = getattr(trt, CLASSES[name])
    methods = vars(getattr(fake_gpu, name)).items()
    for method, fake in methods:
        if method.startswith("_") or method in OURS:
            continue
        said = getattr(real, method).__doc__
        forms = re.findall(rf"{method}\((self.*?)\) -> ", said)
        counts = {len(re.findall(r"(?:^|, )\w+: ", form)) for form in forms}
        assert len(inspect.signature(fake).parameters) in counts, (method, said)


@needs_rtx
def test_names_of_tensorrt() -> None:
    trt: Any = import_module("tensorrt_rtx")
    for kind in ("DataType", "EngineInvalidityDiagnostics"):
        for member in getattr(fake_gpu.FakeTensorRT, kind):
            assert int(getattr(getattr(trt, kind), member.name)) == member, member
    for name in ("STATIC", "USER_MANAGED"):
        assert hasattr(trt.ExecutionContextAllocationStrategy, name)
    assert {m.name for m in fake_gpu.Mode} <= set(trt.TensorIOMode.__members__)
    assert hasattr(trt.DynamicShapesKernelSpecializationStrategy, "EAGER")
    assert hasattr(trt.IProfiler, "report_layer_time")
