"""Command ``wanx doctor``: what this machine can run and export."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import typer

from wanx.builtin import open_named
from wanx.commands.options import Json, print_json
from wanx.errors import EnvironmentMismatchError, WanxError
from wanx.exporter.packages import PACKAGES


@dataclass(frozen=True)
class Finding:
    """Result of one check; a ``required`` one must be ``ok`` for a bundle to run."""

    name: str
    ok: bool
    detail: str
    required: bool = True


def doctor(as_json: Json = False) -> None:
    """Say what this machine can run and export; exit 4 if it cannot run a bundle."""
    findings = examine()
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        _print(findings)
    if any(finding.required and not finding.ok for finding in findings):
        raise typer.Exit(EnvironmentMismatchError.exit_code)


def examine() -> list[Finding]:
    """Check the interpreter, the machine, the packages and the built-in bundle."""
    return [
        Finding("python", True, f"{platform.python_version()} on {platform.platform()}"),
        Finding("processor", True, f"{os.cpu_count()} cores, {_memory()}"),
        Finding("disk", True, f"{shutil.disk_usage(Path.cwd()).free / 1e9:.0f} GB free here"),
        _checked("onnxruntime", _onnxruntime),
        _checked("video", _video),
        _checked("built-in model", _builtin),
        _export(),
        _gpu(),
        _compiler(),
    ]


def _checked(name: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, look())
    except (ImportError, OSError, WanxError) as error:
        return Finding(name, False, f"{error}; reinstall wanx")


def _memory() -> str:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return "memory unknown"
    return f"{total / 1e9:.0f} GB of memory"


def _onnxruntime() -> str:
    runtime = importlib.import_module("onnxruntime")
    providers = ", ".join(
        p.removesuffix("ExecutionProvider") for p in runtime.get_available_providers()
    )
    return f"{runtime.__version__} with {providers}"


def _video() -> str:
    av = importlib.import_module("av")
    codecs = av.codec.codecs_available
    missing = [codec for codec in ("libx264", "libvpx-vp9", "gif") if codec not in codecs]
    if missing:
        raise OSError(f"PyAV {av.__version__} lacks {', '.join(missing)}")
    return f"PyAV {av.__version__} with H.264, VP9 and GIF"


def _builtin() -> str:
    bundle = open_named("tiny", verify="full")
    return f"{bundle.manifest.name} at {bundle.manifest.precision}, intact"


def _export() -> Finding:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            detail = f"{package} is not installed; pip install 'wanx[export]' to export"
            return Finding("export", False, detail, required=False)
    return Finding("export", True, ", ".join(found), required=False)


def _gpu() -> Finding:
    """NVIDIA's own tool is asked, which takes no second where PyTorch takes several to import."""
    query = "name,compute_cap,driver_version"
    found = ""
    if tool := shutil.which("nvidia-smi"):
        command = [tool, f"--query-gpu={query}", "--format=csv,noheader"]
        with suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
            found = done.stdout
    gpus = [[part.strip() for part in row.split(",")] for row in found.splitlines()]
    named = [
        f"{name} (SM{capability.replace('.', '')}, driver {driver})"
        for name, capability, driver in (row for row in gpus if len(row) == 3)
    ]
    if not named:
        return Finding("gpu", False, "no NVIDIA GPU found; --target cpu needs none", required=False)
    return Finding("gpu", True, ", ".join(named), required=False)


def _compiler() -> Finding:
    for name in ("g++", "clang++"):
        if shutil.which(name):
            return Finding("c++", True, f"{name}, which --target aoti calls", required=False)
    detail = "no g++ or clang++; --target aoti needs one (apt install g++)"
    return Finding("c++", False, detail, required=False)


def _print(findings: Sequence[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    from wanx.commands.display.generation import OUT

    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        mark = Text("ok", "green") if finding.ok else Text("no", "red" if finding.required else "")
        table.add_row(mark, finding.name, Text(finding.detail))
    OUT.print(table)
