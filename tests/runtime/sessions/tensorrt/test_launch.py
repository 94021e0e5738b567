from __future__ import annotations

import itertools
import sys
from typing import Any

import pytest

from tests.support.plugins import ListeningDriver
from wanx.bundle.plugin_kernel import (
    Description,
    Integer,
    PluginKernel,
    Pointer,
    Real,
    Value,
    Variant,
)
from wanx.errors import EnvironmentMismatchError, WanxError
from wanx.runtime.sessions.tensorrt.launch import Launcher

CONTEXTS = itertools.count(1)
ARGUMENTS = (8, 8, 4, 4, 8, 8)


def kernel(shared: int = 0, sm: int = 89) -> PluginKernel:
    value = Value(dtype="bf16", shape=("a", 64))
    variant = Variant(
        sm=sm, function="_kernel", size=8, warps=2, shared=shared,
        arguments=(Pointer(tensor=0, offset=128), Pointer(tensor=1), Integer(integer=("a",)),
                   Real(real=0.5)),
        grid=(("a",), (2,), (1,)),
    )  # fmt: skip
    description = Description(op="Foo", inputs=(value,), outputs=(value,), variants=(variant,))
    return PluginKernel(description=description, code=b"\x7fELFcode")


def driver(**changes: Any) -> ListeningDriver:
    context = changes.pop("context", next(CONTEXTS))
    return ListeningDriver(**{"sm": 89, "arguments": ARGUMENTS, "context": context, **changes})


def names(listening: ListeningDriver) -> list[str]:
    return [call[0] for call in listening.calls]


def test_a_launch_is_one_call() -> None:
    listening = driver()
    launcher = Launcher(kernel(), listening)
    launcher.set_shapes([(5, 64)])
    listening.calls.clear()
    for start in (0, 4096):
        launcher.launch([1 << 40, (1 << 41) + start], 9)
    assert names(listening) == ["cuLaunchKernel"] * 2
    arguments = listening.calls[1][-2]
    addresses = [int.from_bytes(argument, "little") for argument in arguments]
    assert addresses[:3] == [(1 << 40) + 128, (1 << 41) + 4096, 5]


def test_code_is_loaded_once_for_a_gpu() -> None:
    listening = driver()
    for _ in range(3):
        Launcher(kernel(), listening).load()
    assert names(listening).count("cuModuleLoadData") == 1
    other = driver()
    Launcher(kernel(), other).load()
    assert names(other).count("cuModuleLoadData") == 1


@pytest.mark.parametrize(
    ("shared", "asked"), [(48 << 10, []), ((48 << 10) + 16, [(48 << 10) + 16])]
)
def test_much_shared_memory_is_asked_for(shared: int, asked: list[int]) -> None:
    listening = driver()
    Launcher(kernel(shared), listening).load()
    calls = [call for call in listening.calls if call[0] == "cuFuncSetAttribute"]
    assert [call[1:] for call in calls] == [("function", "shared bytes", n) for n in asked]


def test_nothing_is_launched_on_nothing() -> None:
    listening = driver()
    launcher = Launcher(kernel(), listening)
    launcher.set_shapes([(0, 64)])
    launcher.launch([0, 0], 0)
    assert "cuLaunchKernel" not in names(listening)


def test_shapes_and_addresses_that_do_not_fit_are_refused() -> None:
    launcher = Launcher(kernel(), driver())
    with pytest.raises(WanxError, match=r"compiled for \[a, 64\], not \[5, 65\]"):
        launcher.set_shapes([(5, 65)])
    launcher.set_shapes([(5, 64)])
    with pytest.raises(WanxError, match="no multiple of 16 bytes"):
        launcher.launch([4096, 4104], 0)


@pytest.mark.parametrize("call", ["cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel"])
def test_what_the_driver_refuses_is_one_line(call: str) -> None:
    def run() -> None:
        launcher = Launcher(kernel(), driver(failing=call))
        launcher.set_shapes([(5, 64)])
        launcher.launch([0, 0], 0)

    with pytest.raises(WanxError, match=f"{call} answers CUDA_ERROR_SOMETHING") as caught:
        run()
    assert "\n" not in str(caught.value)


def test_another_gpu_is_refused() -> None:
    with pytest.raises(EnvironmentMismatchError, match="was built for sm89, and this GPU is sm120"):
        Launcher(kernel(), driver(sm=120)).load()


def test_no_gpu_is_refused() -> None:
    with pytest.raises(WanxError, match="has not opened a GPU"):
        Launcher(kernel(), driver(context=0)).load()


def test_cuda_python_is_asked_for_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    launcher = Launcher(kernel())
    with pytest.raises(EnvironmentMismatchError, match="pip install"):
        launcher.load()
