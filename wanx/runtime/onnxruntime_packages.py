"""Packages of ONNX Runtime: which are installed, and whose files are in use.

``onnxruntime``, ``onnxruntime-gpu`` and others own one folder, ``onnxruntime/``. Installers
overwrite each other's files there without a word, and who is uninstalled takes the other's along.
Only the files tell which package was last: each package recorded their sizes and hashes.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.metadata import Distribution, PackageNotFoundError, distributions, version
from pathlib import Path

CPU_PACKAGE = "onnxruntime"
# Of wanx's extras, those that add an execution provider as a package with a folder of its own.
PLUG_INS: Mapping[str, str] = {
    "openvino": "onnxruntime-ep-openvino",
    "webgpu": "onnxruntime-ep-webgpu",
    "tensorrt-rtx": "onnxruntime-ep-nv-tensorrt-rtx-cu13",
}
_FOLDER = "onnxruntime"
# What every package has, and no two packages alike: 52 bytes with its name and version, and the
# library. Of that only the size is compared, since hashing 36 MB takes longer than all the rest.
_PROBES = (
    re.compile(r"onnxruntime/capi/build_and_package_info\.py"),
    re.compile(r"onnxruntime/capi/onnxruntime_pybind11_state[\w.-]*\.(?:so|pyd)"),
)
_MOST_HASHED = 1_000_000


@dataclass(frozen=True, kw_only=True)
class InstalledPackage:
    """Package that owns the folder ``onnxruntime``.

    Attributes:
        name: normalised, such as ``onnxruntime-gpu``.
        version: as the package says; may be empty.
        intact: True if the files in the folder are its own, False if they are missing or another's,
            None if it has no record of them, or none that holds.
    """

    name: str
    version: str
    intact: bool | None

    def __str__(self) -> str:
        return f"{self.name} {self.version}".rstrip()


def installed_packages(path: Sequence[str] | None = None) -> list[InstalledPackage]:
    """List the packages that own the folder which ``import onnxruntime`` finds, by name.

    Nothing is imported. Of what cannot be read, nothing is listed.

    Args:
        path: folders to search; None takes those of Python.
    """
    imported = _imported_from(path)
    everything = distributions() if path is None else distributions(path=list(path))
    found = {_read(distribution, imported) for distribution in everything}
    return sorted(filter(None, found), key=lambda package: (package.name, package.version))


def package_fault(packages: Sequence[InstalledPackage]) -> str | None:
    """Fault of the installed packages, with the command that mends it; None if there is none.

    ``onnxruntime`` below another package is fine, as long as the other one's files are in use: so
    wanx, which requires ``onnxruntime``, stays satisfied.

    Args:
        packages: as :func:`installed_packages` lists them.
    """
    if not packages:
        return None
    names = list(dict.fromkeys(package.name for package in packages))
    in_use = [package.name for package in packages if package.intact]
    if not in_use:  # or may be
        in_use = [package.name for package in packages if package.intact is None]
    # Whoever adds a package to the one that wanx requires wants what it adds.
    added = [name for name in names if name != CPU_PACKAGE]
    wanted = next((name for name in added if name in in_use), (added or names)[0])
    if wanted in in_use and len(added) < 2:
        return None
    listed = _listed(packages)
    if len(names) < 2:
        fault = f"files of {listed} are missing or another package's"
    elif in_use:
        fault = f"{listed} share a folder, whose files are those of {in_use[0]}"
    else:
        fault = f"{listed} share a folder, whose files are mixed or missing"
    command = _reinstall(packages, wanted)
    if unwanted := " ".join(name for name in added if name != wanted):
        command = f"keep one, such as {wanted}: pip uninstall -y {unwanted} && {command}"
    return f"{fault}: {command}"


def plug_in_version(extra: str) -> str | None:
    """Version of the plug-in package that an extra of wanx installs; None if none can be read.

    Args:
        extra: a key of :data:`PLUG_INS`.
    """
    try:
        return version(PLUG_INS[extra])
    except (PackageNotFoundError, KeyError, OSError, ValueError):
        return None


def _listed(packages: Sequence[InstalledPackage]) -> str:
    *first, last = map(str, packages)
    return f"{', '.join(first)} and {last}" if first else last


def _reinstall(packages: Sequence[InstalledPackage], name: str) -> str:
    """Command that lays a package's files over all others; uv has it too, as ``uv pip install``."""
    versions = {package.version for package in packages if package.name == name} - {""}
    pin = f"=={versions.pop()}" if len(versions) == 1 else ""
    return f"pip install --force-reinstall --no-deps {name}{pin}"


def _imported_from(path: Sequence[str] | None) -> Path | None:
    """Folder that ``onnxruntime`` is imported from; None if there is none, or only remains."""
    spec = PathFinder.find_spec(_FOLDER, None if path is None else list(path))
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parents[1].resolve()


def _read(distribution: Distribution, imported: Path | None) -> InstalledPackage | None:
    """Read a distribution; None if it is not of ONNX Runtime, or hidden by another one's folder."""
    try:
        if _FOLDER not in (distribution.read_text("top_level.txt") or "").split():
            return None
        root = Path(str(distribution.locate_file(""))).resolve()
        if imported is not None and root != imported:
            return None
        metadata = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
        if not (name := _field(metadata, "Name")):
            return None
        return InstalledPackage(
            name=re.sub(r"[-_.]+", "-", name).lower(),
            version=_field(metadata, "Version"),
            intact=_is_intact(distribution, root),
        )
    except (OSError, ValueError):  # unreadable, or not UTF-8
        return None


def _field(metadata: str, key: str) -> str:
    match = re.search(rf"^{key}:[ \t]*(\S*)", metadata, re.MULTILINE)
    return match[1] if match else ""


def _is_intact(distribution: Distribution, root: Path) -> bool | None:
    # conda changes the libraries after it has recorded them.
    if (distribution.read_text("INSTALLER") or "").strip() == "conda":
        return None
    # Distribution.files leaves out what is missing, from Python 3.12 on.
    try:
        rows = list(csv.reader((distribution.read_text("RECORD") or "").splitlines()))
    except csv.Error:
        return None
    rows = [row for row in rows if len(row) == 3]
    states = [
        [_is_own(root / name, *facts) for name, *facts in rows if probe.fullmatch(name)]
        for probe in _PROBES
    ]
    return all(map(all, states)) if all(states) else None


def _is_own(path: Path, recorded_hash: str, recorded_size: str) -> bool:
    """True if a file has the size and, if it is small, the hash that a package recorded."""
    try:
        size = path.stat().st_size
        if recorded_size and str(size) != recorded_size:
            return False
        algorithm, _, expected = recorded_hash.partition("=")
        if algorithm != "sha256" or size > _MOST_HASHED:
            return True
        digest = hashlib.sha256(path.read_bytes()).digest()
    except OSError:
        return False
    return base64.urlsafe_b64encode(digest).decode().rstrip("=") == expected
