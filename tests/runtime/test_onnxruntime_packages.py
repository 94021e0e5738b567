"""Packages that own the folder of ONNX Runtime, in every order, and what is left of them."""

from __future__ import annotations

import base64
import csv
import hashlib
import itertools
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support.paths import ROOT
from wanx.runtime.onnxruntime_packages import (
    PLUG_INS,
    InstalledPackage,
    installed_packages,
    package_fault,
    plug_in_version,
)

LIBRARY = "onnxruntime/capi/onnxruntime_pybind11_state.cpython-311-x86_64-linux-gnu.so"
FACTS = "onnxruntime/capi/build_and_package_info.py"
REINSTALL = "pip install --force-reinstall --no-deps"


@dataclass
class SitePackages:
    """Folder that packages are installed into as pip does it: file by file, over what is there."""

    path: Path

    def info(self, name: str, version: str) -> Path:
        return self.path / f"{name.replace('-', '_')}-{version}.dist-info"

    def install(self, name: str, version: str, library: bytes | None = None) -> None:
        files = {
            "onnxruntime/__init__.py": b"",
            FACTS: f"package_name = {name!r}\n__version__ = {version!r}\n".encode(),
            LIBRARY: library if library is not None else f"{name} {version}".encode(),
        }
        rows = []
        for file, content in files.items():
            path = self.path / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode()
            rows.append([file, f"sha256={digest.rstrip('=')}", str(len(content))])
        info = self.info(name, version)
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "top_level.txt").write_text("onnxruntime\n")
        rows.append([f"{info.name}/RECORD", "", ""])
        with (info / "RECORD").open("w", newline="") as file:
            csv.writer(file).writerows(rows)

    def uninstall(self, name: str, version: str) -> None:
        info = self.info(name, version)
        for row in csv.reader((info / "RECORD").read_text().splitlines()):
            (self.path / row[0]).unlink(missing_ok=True)
        for path in info.iterdir():
            path.unlink()
        info.rmdir()

    def packages(self) -> list[InstalledPackage]:
        return installed_packages([str(self.path)])

    def states(self) -> dict[str, bool | None]:
        return {package.name: package.intact for package in self.packages()}

    def fault(self) -> str | None:
        return package_fault(self.packages())


@pytest.fixture
def site(tmp_path: Path) -> SitePackages:
    return SitePackages(tmp_path)


CPU, GPU, DIRECTML = (
    ("onnxruntime", "1.32.0"),
    ("onnxruntime-gpu", "1.31.1"),
    ("onnxruntime-directml", "1.24.4"),
)


def test_without_any(site: SitePackages) -> None:
    assert site.packages() == []
    assert site.fault() is None


@pytest.mark.parametrize("package", [CPU, GPU])
def test_one_that_is_intact(site: SitePackages, package: tuple[str, str]) -> None:
    site.install(*package)
    name, version = package
    assert site.packages() == [InstalledPackage(name=name, version=version, intact=True)]
    assert str(site.packages()[0]) == f"{name} {version}"
    assert site.fault() is None


def test_the_gpu_package_last_is_as_documented(site: SitePackages) -> None:
    site.install(*CPU)
    site.install(*GPU)
    assert site.states() == {"onnxruntime": False, "onnxruntime-gpu": True}
    assert site.fault() is None


def test_the_cpu_package_last_hides_the_gpu(site: SitePackages) -> None:
    site.install(*GPU)
    site.install(*CPU)
    assert site.states() == {"onnxruntime": True, "onnxruntime-gpu": False}
    assert site.fault() == (
        "onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 share a folder, whose files are those of "
        f"onnxruntime: {REINSTALL} onnxruntime-gpu==1.31.1"
    )


@pytest.mark.parametrize("order", [(CPU, GPU), (GPU, CPU)])
@pytest.mark.parametrize("gone", [CPU, GPU])
def test_uninstalling_either_breaks_the_other(
    site: SitePackages, order: tuple[tuple[str, str], ...], gone: tuple[str, str]
) -> None:
    for package in order:
        site.install(*package)
    site.uninstall(*gone)
    ((name, version),) = {CPU, GPU} - {gone}
    assert site.states() == {name: False}
    assert site.fault() == (
        f"files of {name} {version} are missing or another package's: {REINSTALL} {name}=={version}"
    )
    site.install(name, version)  # the command
    assert site.fault() is None


@pytest.mark.parametrize("order", [(CPU, GPU), (GPU, CPU)])
@pytest.mark.parametrize("file", [FACTS, LIBRARY])
def test_files_of_both(site: SitePackages, order: tuple[tuple[str, str], ...], file: str) -> None:
    """Installers that unpack several packages at once may leave some files of each."""
    first, last = order
    site.install(*first)
    kept = (site.path / file).read_bytes()
    site.install(*last)
    (site.path / file).write_bytes(kept)
    assert site.states() == {"onnxruntime": False, "onnxruntime-gpu": False}
    assert site.fault() == (
        "onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 share a folder, whose files are mixed or "
        f"missing: {REINSTALL} onnxruntime-gpu==1.31.1"
    )


def test_a_library_of_one_size_is_told_apart_by_the_other_file(site: SitePackages) -> None:
    site.install(*GPU, library=b"alike")
    site.install(*CPU, library=b"alike")
    assert site.states() == {"onnxruntime": True, "onnxruntime-gpu": False}


@pytest.mark.parametrize("order", list(itertools.permutations([CPU, GPU, DIRECTML])))
def test_three(site: SitePackages, order: tuple[tuple[str, str], ...]) -> None:
    for package in order:
        site.install(*package)
    last, _ = order[-1]
    wanted, pin = ("onnxruntime-directml", "1.24.4") if last == "onnxruntime" else order[-1]
    (unwanted,) = {"onnxruntime-gpu", "onnxruntime-directml"} - {wanted}
    assert site.states()[last] is True
    assert site.fault() == (
        "onnxruntime 1.32.0, onnxruntime-directml 1.24.4 and onnxruntime-gpu 1.31.1 share a "
        f"folder, whose files are those of {last}: keep one, such as {wanted}: "
        f"pip uninstall -y {unwanted} && {REINSTALL} {wanted}=={pin}"
    )


def test_two_records_of_one_package(site: SitePackages) -> None:
    """As an upgrade leaves them that was interrupted."""
    site.install("onnxruntime", "1.31.0")
    site.install("onnxruntime", "1.32.0")
    assert [(package.version, package.intact) for package in site.packages()] == [
        ("1.31.0", False), ("1.32.0", True),
    ]  # fmt: skip
    assert site.fault() is None
    (site.path / LIBRARY).unlink()
    assert site.fault() == (
        "files of onnxruntime 1.31.0 and onnxruntime 1.32.0 are missing or another package's: "
        f"{REINSTALL} onnxruntime"
    )


def test_one_folder_twice(site: SitePackages, tmp_path: Path) -> None:
    site.install(*CPU)
    (tmp_path / "lib64").symlink_to(tmp_path)
    folders = [str(tmp_path), str(tmp_path / "lib64"), str(tmp_path)]
    assert len(installed_packages(folders)) == 1


def test_another_folder_is_hidden(tmp_path: Path) -> None:
    """As that of the system is by a virtual environment."""
    own, system = (SitePackages(tmp_path / name) for name in ("own", "system"))
    own.install(*GPU)
    system.install(*CPU)
    folders = [str(own.path), str(system.path)]
    assert [package.name for package in installed_packages(folders)] == ["onnxruntime-gpu"]
    own.uninstall(*GPU)  # Python goes on to a folder that has an __init__.py
    assert [package.name for package in installed_packages(folders)] == ["onnxruntime"]


def test_other_packages_are_not_listed(site: SitePackages) -> None:
    site.install(*CPU)
    info = site.info("onnxruntime-ep-openvino", "1.8.1")
    info.mkdir()
    (info / "METADATA").write_text("Name: onnxruntime-ep-openvino\nVersion: 1.8.1\n")
    (info / "top_level.txt").write_text("onnxruntime_ep_openvino\n")
    assert list(site.states()) == ["onnxruntime"]


def test_names_are_normalised(site: SitePackages) -> None:
    site.install("ONNXRuntime_GPU", "1.31.1")
    assert list(site.states()) == ["onnxruntime-gpu"]


class TestOddRecords:
    def without_record(self, site: SitePackages) -> None:
        (site.info(*GPU) / "RECORD").unlink()

    def empty(self, site: SitePackages) -> None:
        (site.info(*GPU) / "RECORD").write_text("")

    def folder(self, site: SitePackages) -> None:
        self.without_record(site)
        (site.info(*GPU) / "RECORD").mkdir()

    def short_rows(self, site: SitePackages) -> None:
        (site.info(*GPU) / "RECORD").write_text(f"\n{FACTS}\n{LIBRARY},\n{LIBRARY},,1,2\n")

    def open_quote(self, site: SitePackages) -> None:
        (site.info(*GPU) / "RECORD").write_text(f'"{"x" * 200_000}')

    def editable(self, site: SitePackages) -> None:
        (site.info(*GPU) / "RECORD").write_text("__editable__.onnxruntime.pth,,\n")

    def conda(self, site: SitePackages) -> None:
        (site.path / LIBRARY).write_bytes(b"its libraries are changed after they were recorded")
        (site.info(*GPU) / "INSTALLER").write_text("conda\n")

    @pytest.mark.parametrize(
        "kind",
        ["without_record", "empty", "folder", "short_rows", "open_quote", "editable", "conda"],
    )
    def test_they_are_not_a_fault(self, site: SitePackages, kind: str) -> None:
        site.install(*GPU)
        getattr(self, kind)(site)
        assert site.states() == {"onnxruntime-gpu": None}
        assert site.fault() is None

    def test_whose_files_then_follows_from_the_other(self, site: SitePackages) -> None:
        site.install(*CPU)
        site.install(*GPU)
        self.without_record(site)
        assert site.states() == {"onnxruntime": False, "onnxruntime-gpu": None}
        assert site.fault() is None
        site.install(*CPU)
        assert site.states() == {"onnxruntime": True, "onnxruntime-gpu": None}
        assert "whose files are those of onnxruntime: " in (site.fault() or "")

    @pytest.mark.parametrize("row", [f"{FACTS},,", f"{FACTS},md5=1234,", f"{FACTS},,{{size}}"])
    def test_what_a_record_leaves_out_is_not_compared(self, site: SitePackages, row: str) -> None:
        site.install(*GPU)
        row = row.format(size=(site.path / FACTS).stat().st_size)
        (site.info(*GPU) / "RECORD").write_text(f"{row}\n{LIBRARY},,\n")
        assert site.states() == {"onnxruntime-gpu": True}

    @pytest.mark.parametrize("file", ["METADATA", "top_level.txt"])
    @pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"Name\n"])
    def test_without_a_name_nothing_is_listed(
        self, site: SitePackages, file: str, content: bytes | None
    ) -> None:
        site.install(*GPU)
        path = site.info(*GPU) / file
        path.unlink() if content is None else path.write_bytes(content)
        assert site.packages() == []

    def test_without_a_version(self, site: SitePackages) -> None:
        site.install(*GPU)
        (site.info(*GPU) / "METADATA").write_text("Name: onnxruntime-gpu\nVersion:\n")
        (site.path / LIBRARY).unlink()
        fault = "files of onnxruntime-gpu are missing or another package's"
        assert site.fault() == f"{fault}: {REINSTALL} onnxruntime-gpu"

    def test_a_file_that_cannot_be_read(
        self, site: SitePackages, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        site.install(*GPU)

        def refuse(path: Path) -> bytes:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "read_bytes", refuse)
        assert site.states() == {"onnxruntime-gpu": False}

    def test_an_egg(self, site: SitePackages) -> None:
        info = site.path / "onnxruntime_gpu-1.31.1.egg-info"
        info.mkdir()
        (info / "PKG-INFO").write_text("Name: onnxruntime-gpu\nVersion: 1.31.1\n")
        (info / "top_level.txt").write_text("onnxruntime\n")
        assert site.states() == {"onnxruntime-gpu": None}


def test_the_folders_of_python(site: SitePackages, monkeypatch: pytest.MonkeyPatch) -> None:
    site.install(*GPU)
    monkeypatch.setattr(sys, "path", [str(site.path), *sys.path])
    assert installed_packages() == site.packages()


def test_what_runs_here_is_intact() -> None:
    packages = installed_packages()
    assert [package.intact for package in packages if package.name != "onnxruntime"] in ([], [True])
    assert package_fault(packages) is None


def test_plug_ins_are_those_of_the_extras() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for extra, name in PLUG_INS.items():
        assert [Requirement(line).name for line in extras[extra]] == [name]


def test_versions_of_plug_ins(site: SitePackages, monkeypatch: pytest.MonkeyPatch) -> None:
    info = site.info("onnxruntime-ep-webgpu", "0.4.0")
    info.mkdir()
    (info / "METADATA").write_text("Name: onnxruntime-ep-webgpu\nVersion: 0.4.0\n")
    monkeypatch.setattr(sys, "path", [str(site.path)])
    versions = {extra: plug_in_version(extra) for extra in PLUG_INS}
    assert versions == {"openvino": None, "webgpu": "0.4.0", "tensorrt-rtx": None}
    for odd in (b"Name: onnxruntime-ep-webgpu\n", b"\xff\xfe"):
        (info / "METADATA").write_bytes(odd)
        assert plug_in_version("webgpu") is None
