from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.paths import ROOT
from tests.support.plugins import CASES, Case, ListeningDriver
from wanx.bundle.plugin_kernel import Integer, PluginKernel, Real, read_plugin_kernel
from wanx.errors import EnvironmentMismatchError, WanxError
from wanx.exporter.targets.tensorrt.kernels import LaunchCapture, compile_plugin_kernel
from wanx.exporter.targets.tensorrt.ops import OPS, Spec
from wanx.kernels.launch import capture_launches
from wanx.runtime.sessions.tensorrt.launch import HIDDEN, Launcher

SMS = (89, 120)
COMPILE = """
import json, sys, torch
from pathlib import Path
from tests.support.plugins import CASES
from wanx.exporter.targets.tensorrt import kernels
folder, names, sms = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
compile_for, ptx = kernels.compile_for, []
def kept(launch, sm):
    compiled = compile_for(launch, sm)
    ptx.append(compiled.asm["ptx"])
    return compiled
kernels.compile_for = kept
for index, name in enumerate(names):
    case = CASES[name]
    ptx.clear()
    carried = kernels.compile_plugin_kernel(case.op, case.inputs, case.attributes, sms)
    for part, data in zip(("description", "code"), carried.fields()):
        (folder / f"{index}.{part}").write_bytes(data)
    (folder / f"{index}.ptx").write_text(json.dumps(ptx))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[PluginKernel, Any]]:
    """Each case and the PTX of its kernels; another process, since here kernels are interpreted."""
    folder = tmp_path_factory.mktemp("kernels")
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    arguments = [str(folder), json.dumps(list(CASES)), json.dumps(SMS)]
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {}
    for index, name in enumerate(CASES):
        parts = [(folder / f"{index}.{part}").read_bytes() for part in ("description", "code")]
        ptx = json.loads((folder / f"{index}.ptx").read_text())
        found[name] = read_plugin_kernel(*parts), ptx
    return found


def launched(case: Case, sm: int, shapes: Sequence[tuple[int, ...]]) -> tuple[Any, ...]:
    """Grid, arguments and meta-parameters of a launch on these shapes, and its tensors."""
    tensors = [
        torch.empty(shape, dtype=spec.dtype, device="meta")
        for shape, spec in zip(shapes, case.inputs, strict=True)
    ]
    calls: list[tuple[Any, ...]] = []
    with capture_launches(lambda *call: calls.append(call), sm):
        outputs = OPS[case.op].run(*tensors, **case.attributes)
    ((_, grid, values, meta),) = calls
    return grid, values, meta, [*tensors, *outputs]


@pytest.mark.parametrize("sm", [80, 89, 90, 120])
@pytest.mark.parametrize("name", CASES)
def test_a_description_says_what_a_launch_does(name: str, sm: int) -> None:
    case = CASES[name]
    capture = LaunchCapture(case.op, case.inputs, case.attributes, sm)
    variant = {
        "sm": sm, "function": "f", "size": 4, "warps": 4, "shared": 0,
        "arguments": [a.model_dump() for a in capture.arguments], "grid": capture.grid,
    }  # fmt: skip
    text = json.dumps(
        {
            "op": case.op,
            "inputs": [value.model_dump() for value in capture.inputs],
            "outputs": [value.model_dump() for value in capture.outputs],
            "variants": [variant],
        }
    )
    description = read_plugin_kernel(text.encode(), b"\x7fELF").description
    (described,) = description.variants
    for batch in (1, 2, 3, 7):
        for length in (1, 2, 15, 16, 17, 512, 1021, 32760, 75600):
            shapes = case.shapes(batch, length)
            axes = description.axes_at(shapes)
            grid, values, _, tensors = launched(case, sm, shapes)
            assert described.grid_at(axes) == (*grid, 1, 1)[:3]
            integers = described.integers_at(axes)
            for place, (argument, value) in enumerate(
                zip(described.arguments, values, strict=True)
            ):
                if isinstance(argument, Integer):
                    # A single batch entry never uses its stride.
                    unused = batch == 1 and case.op == "AdaLNQuantize" and value == 0
                    assert integers[place] == value or unused
                elif isinstance(argument, Real):
                    assert argument.real == value
                else:
                    assert value is tensors[argument.tensor]
                    assert argument.offset == 0
            for said, made in zip(description.outputs, tensors[len(shapes) :], strict=True):
                assert tuple(axes.get(n, n) for n in said.shape) == made.shape


def test_a_part_of_a_tensor_has_its_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(packed: Tensor, *others: Tensor, **attributes: Any) -> tuple[Tensor, ...]:
        q, k, _ = packed.tensor_split(3, dim=-1)
        return OPS["RMSNormRope"].run(q, k, *others, **attributes)

    rope = CASES["rope"]
    inputs = (Spec(torch.bfloat16, ("B", "L", 4608)), *rope.inputs[2:])
    monkeypatch.setitem(OPS, "Packed", type(OPS["RMSNormRope"])(run=run, unsupported_reason=None))
    capture = LaunchCapture("Packed", inputs, rope.attributes, 89)
    q, k = (argument.model_dump() for argument in capture.arguments[:2])
    assert (q, k) == ({"tensor": 0, "offset": 0}, {"tensor": 0, "offset": 2 * 1536})
    assert [a.integer for a in capture.arguments if isinstance(a, Integer)][2] == (4608,)


def parameters(ptx: str) -> list[str]:
    """Types of a kernel's parameters, those that Triton adds included."""
    entry = ptx[ptx.index(".entry") :]
    return re.findall(r"\.param \.(\w+)", entry[: entry.index(")")])


SIZES = {"u64": 8, "u32": 4, "f32": 4, "b64": 8, "b32": 4}


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("name", CASES)
def test_the_launcher_does_what_triton_does(
    name: str, sm: int, compiled: dict[str, tuple[PluginKernel, Any]]
) -> None:
    case, (kernel, ptx) = CASES[name], compiled[name]
    sizes = [SIZES[kind] for kind in parameters(ptx[SMS.index(sm)])]
    driver = ListeningDriver(sm, sizes, context=id(case))
    launcher = Launcher(kernel, driver)
    launcher.load()
    loads = [call for call in driver.calls if call[0] == "cuModuleLoadData"]
    variant, binary = kernel.variant_for(sm)
    assert [call[1] for call in loads] == [binary]
    driver.capturing = True
    for batch, length in ((1, 1), (2, 1000), (1, 32760), (2, 75600)):
        shapes = case.shapes(batch, length)
        grid, values, meta, tensors = launched(case, sm, shapes)
        launcher.set_shapes(shapes)
        addresses = [4096 * (index + 1) for index in range(len(tensors))]
        before = len(driver.calls)
        launcher.launch(addresses, 77)
        (call,) = driver.calls[before:]
        *_, arguments, extra = call
        threads = 32 * meta["num_warps"]
        assert call[2:5] == (*grid, 1, 1)[:3]
        assert call[5:10] == (threads, 1, 1, variant.shared, 77)
        assert extra == 0
        assert len(arguments) == len(values) + HIDDEN
        place_of = {id(tensor): place for tensor, place in zip(tensors, addresses, strict=True)}
        for value, found in zip(values, arguments, strict=False):
            if isinstance(value, Tensor):
                assert found == struct.pack("<Q", place_of[id(value)])
            elif isinstance(value, float):
                assert found == struct.pack("<f", value)
            elif value or batch > 1:
                assert found == struct.pack("<i", value)
        assert arguments[-HIDDEN:] == [bytes(8), bytes(8)]


def test_loads_are_as_wide_as_tritons_own(
    compiled: dict[str, tuple[PluginKernel, Any]],
) -> None:
    """Addresses and strides are known to be multiples of 16, whatever the length."""
    for name in ("rope", "rope of 40 heads", "gelu, fp8"):
        for ptx in compiled[name][1]:
            assert re.search(r"ld\.global\.v[248]\.b32", ptx), name


def test_a_gpu_without_the_format_is_refused() -> None:
    case = CASES["gelu, fp8"]
    with pytest.raises(EnvironmentMismatchError, match="needs sm89 or newer, not sm86"):
        compile_plugin_kernel(case.op, case.inputs, case.attributes, [86])


def test_a_kernel_that_does_not_compile_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("line one\nline two")

    monkeypatch.setattr("wanx.exporter.targets.tensorrt.kernels.compile_for", broken)
    case = CASES["rope"]
    with pytest.raises(WanxError, match="cannot compile RMSNormRope for sm89") as caught:
        compile_plugin_kernel(case.op, case.inputs, case.attributes, [89])
    assert "\n" not in str(caught.value)
