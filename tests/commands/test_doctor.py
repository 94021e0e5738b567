"""The command ``wanx doctor``: what it says of ONNX Runtime and its packages."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from wanx.cli import main
from wanx.runtime import onnxruntime_packages
from wanx.runtime.onnxruntime_packages import InstalledPackage

Finding = Callable[[str], Mapping[str, Any]]
CPU, GPU = (
    {"name": "onnxruntime", "version": "1.32.0"},
    {"name": "onnxruntime-gpu", "version": "1.31.1"},
)


@pytest.fixture
def finding(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Finding:
    """Run the command in this process; return the line of one name, and its exit code."""

    def run(name: str) -> Mapping[str, Any]:
        monkeypatch.setattr(sys, "argv", ["wanx", "doctor", "--json"])
        with pytest.raises(SystemExit) as exit_info:
            main()
        out, err = capsys.readouterr()
        assert err == ""
        (line,) = (line for line in json.loads(out) if line["name"] == name)
        return line | {"code": exit_info.value.code or 0}

    return run


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let these packages be installed, and Python import this module."""

    def put(*packages: InstalledPackage, module: Any = None) -> None:
        monkeypatch.setattr(onnxruntime_packages, "installed_packages", lambda: list(packages))
        monkeypatch.setitem(sys.modules, "onnxruntime", module)

    return put


def module(version: str, *providers: str) -> SimpleNamespace:
    return SimpleNamespace(__version__=version, get_available_providers=lambda: list(providers))


def test_what_is_installed_here(finding: Finding) -> None:
    import onnxruntime

    line = finding("onnxruntime")
    assert line["ok"]
    assert f" {onnxruntime.__version__} with " in line["detail"]
    assert "CPU" in line["detail"]


def test_the_package_whose_files_are_in_use_is_named(
    finding: Finding, install: Callable[..., None]
) -> None:
    install(
        InstalledPackage(**CPU, intact=False), InstalledPackage(**GPU, intact=True),
        module=module("1.31.1", "CUDAExecutionProvider", "CPUExecutionProvider"),
    )  # fmt: skip
    line = finding("onnxruntime")
    assert (line["ok"], line["code"]) == (True, 0)
    assert line["detail"] == (
        "onnxruntime-gpu 1.31.1 (its files replace those of onnxruntime 1.32.0) with CUDA, CPU"
    )


def test_a_package_without_a_record(finding: Finding, install: Callable[..., None]) -> None:
    install(InstalledPackage(**GPU, intact=None), module=module("1.31.1", "CPUExecutionProvider"))
    assert finding("onnxruntime")["detail"] == "onnxruntime 1.31.1 with CPU"


def test_a_fault_of_the_packages_is_the_line(
    finding: Finding, install: Callable[..., None]
) -> None:
    install(InstalledPackage(**CPU, intact=True), InstalledPackage(**GPU, intact=False))
    line = finding("onnxruntime")
    assert (line["ok"], line["code"]) == (False, 4)
    assert line["detail"] == (
        "onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 share a folder, whose files are those of "
        "onnxruntime: pip install --force-reinstall --no-deps onnxruntime-gpu==1.31.1"
    )


def test_a_folder_that_has_lost_its_files(finding: Finding, install: Callable[..., None]) -> None:
    """Python imports it even so, as a namespace package with nothing in it."""
    install(module=ModuleType("onnxruntime"))
    line = finding("onnxruntime")
    assert (line["ok"], line["code"]) == (False, 4)
    assert line["detail"] == (
        "module 'onnxruntime' has no attribute 'get_available_providers', since files of it are "
        "missing: pip install --force-reinstall --no-deps onnxruntime"
    )


def test_no_package_at_all(finding: Finding, install: Callable[..., None]) -> None:
    install()
    line = finding("onnxruntime")
    assert (line["ok"], line["code"]) == (False, 4)
    assert line["detail"].endswith("; reinstall wanx")


@pytest.mark.parametrize(
    ("versions", "platform", "ok", "detail"),
    [
        ({"openvino": "1.8.1", "webgpu": "0.4.0", "tensorrt-rtx": "0.5.0"}, "linux", True,
         "onnxruntime-ep-openvino 1.8.1, onnxruntime-ep-webgpu 0.4.0, "
         "onnxruntime-ep-nv-tensorrt-rtx-cu13 0.5.0"),
        ({"openvino": "1.8.1", "webgpu": "0.4.0"}, "darwin", True,
         "onnxruntime-ep-openvino 1.8.1, onnxruntime-ep-webgpu 0.4.0"),
        ({"webgpu": "0.4.0"}, "linux", True,
         "onnxruntime-ep-webgpu 0.4.0; not installed: openvino (pip install 'wanx[openvino]'), "
         "tensorrt-rtx (pip install 'wanx[tensorrt-rtx]')"),
        ({}, "darwin", False,
         "not installed: openvino (pip install 'wanx[openvino]'), "
         "webgpu (pip install 'wanx[webgpu]')"),
    ],
)  # fmt: skip
def test_plug_ins(
    finding: Finding,
    monkeypatch: pytest.MonkeyPatch,
    versions: Mapping[str, str],
    platform: str,
    ok: bool,
    detail: str,
) -> None:
    from wanx.commands import doctor

    monkeypatch.setattr(onnxruntime_packages, "plug_in_version", versions.get)
    monkeypatch.setattr(doctor, "sys", SimpleNamespace(platform=platform))
    line = finding("plug-ins")
    assert (line["ok"], line["required"], line["code"]) == (ok, False, 0)
    assert line["detail"] == detail
