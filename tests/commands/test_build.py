"""The command ``wanx build``, and what ``wanx doctor`` says of GPUs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.command_line import Wanx
from wanx import build
from wanx.builtin import builtin_bundle
from wanx.errors import UsageError
from wanx.exporter.targets.tensorrt import gpus, target
from wanx.exporter.targets.tensorrt.ops import OPS


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(builtin_bundle(), tmp_path / "bundle"))


def test_a_target_that_needs_nothing(wanx: Wanx, bundle: Path) -> None:
    code, out, _ = wanx("build", bundle, "--target", "cpu", "--json")
    assert code == 0
    assert json.loads(out)["path"] == str(bundle)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["tiny"], 2, "tiny is built in and stays as it is; `wanx export tiny --target aoti`"),
        (["nowhere"], 2, "nowhere does not exist"),
        (["BUNDLE", "--target", "tpu"], 2, "--target tpu is not available; choose cpu, cuda"),
        (["BUNDLE", "--target", "rtx:sm90"], 2, "TensorRT-RTX does not build for sm90; choose"),
        (["BUNDLE", "--target", "rtx:sm75"], 2, "sm75 has no bf16"),
    ],
)
def test_errors_are_one_line(
    wanx: Wanx, bundle: Path, arguments: list[str], code: int, words: str
) -> None:
    found, _, err = wanx("build", *(bundle if word == "BUNDLE" else word for word in arguments))
    assert found == code
    assert words in err
    assert err.count("\n") == 1


def test_a_built_in_bundle_is_refused_by_the_library_too() -> None:
    words = "tiny is built in and stays as it is; `wanx export tiny --target cpu` makes a bundle of"
    with pytest.raises(UsageError, match=words):
        build("tiny", target="cpu")


def test_plug_ins_that_do_not_fit_are_told(
    wanx: Wanx, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs are those of the model; TensorRT, which is asked for nothing here, is none."""

    def work(folder: Path, request: Mapping[str, Any], on_fraction: object) -> str:
        for name in request["jobs"]:
            (folder / f"{name}.engine").write_bytes(b"engine")
            (folder / f"{name}.json").write_text('{"lines": []}')
        return ""

    monkeypatch.setattr(target, "_work", work)
    monkeypatch.setattr(gpus, "import_tensorrt", lambda name: SimpleNamespace(__version__="99.0"))
    narrow = replace(OPS["RMSNormRope"], unsupported_reason=lambda *_: "heads are narrow")
    monkeypatch.setitem(OPS, "RMSNormRope", narrow)
    plugins = ("--plugins", "RMSNormRope,GeluQuantize")
    code, out, err = wanx("build", bundle, "--target", "rtx:sm89", *plugins, "--json")
    assert code == 0
    assert json.loads(out)["path"] == str(bundle)
    assert [line for line in err.splitlines() if line.startswith("plug-in")] == [
        "plug-in RMSNormRope: takes 0 of 1 nodes, not those where heads are narrow (1)",
        "plug-in GeluQuantize: takes 0 of 0 nodes",  # nothing is quantised
    ]


def test_without_a_compiler(
    wanx: Wanx, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = wanx("build", bundle, "-q")
    assert code == 4
    assert "--target aoti needs a C++ compiler" in err
    assert wanx("verify", bundle, "--no-golden")[0] == 0


@pytest.mark.parametrize(
    ("prints", "ok", "detail"),
    [
        ("echo 'NVIDIA H200, 9.0, 580.1'", True, "NVIDIA H200 (SM90, driver 580.1)"),
        ("echo 'NVIDIA A, 8.9, 1'; echo 'NVIDIA B, 12.0, 1'", True,
         "NVIDIA A (SM89, driver 1), NVIDIA B (SM120, driver 1)"),
        ("echo 'No devices were found'; exit 6", False, "no NVIDIA GPU found"),
        ("echo 'No devices were found'", False, "no NVIDIA GPU found"),
    ],
)  # fmt: skip
def test_the_doctor_asks_for_gpus(
    wanx: Wanx,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    prints: str,
    ok: bool,
    detail: str,
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{prints}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    code, out, _ = wanx("doctor", "--json")
    assert code == 0
    (gpu,) = (finding for finding in json.loads(out) if finding["name"] == "gpu")
    assert gpu["ok"] is ok
    assert gpu["detail"].startswith(detail)
    assert not gpu["required"]
