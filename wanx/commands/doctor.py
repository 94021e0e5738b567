"""Command ``wanx doctor``: what this machine can run and export."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import typer

from wanx.builtin import open_named
from wanx.commands.options import Json, print_json
from wanx.errors import EnvironmentMismatchError, WanxError


@dataclass(frozen=True)
class CheckResult:
    """Result of one check; a ``required`` one must be ``ok`` for a bundle to run."""

    name: str
    ok: bool
    detail: str
    required: bool = True


def doctor(as_json: Json = False) -> None:
    """Say what this machine can run and export; exit 4 if it cannot run a bundle."""
    results = run_checks()
    if as_json:
        print_json([asdict(result) for result in results])
    else:
        _print(results)
    if any(result.required and not result.ok for result in results):
        raise typer.Exit(EnvironmentMismatchError.exit_code)


def run_checks() -> list[CheckResult]:
    """Check the interpreter, the machine, the packages and the built-in bundle."""
    return [
        CheckResult("python", True, f"{platform.python_version()} on {platform.platform()}"),
        CheckResult("processor", True, f"{os.cpu_count()} cores, {_memory()}"),
        CheckResult("disk", True, f"{shutil.disk_usage('.').free / 1e9:.0f} GB free here"),
        _check("onnxruntime", _onnxruntime),
        _plug_ins(),
        _check("video", _video),
        _check("built-in model", _builtin),
        _export(),
        _hub(),
        _gpu(),
        _compiler(),
        _leftovers(Path()),
    ]


def _check(name: str, probe: Callable[[], str]) -> CheckResult:
    try:
        return CheckResult(name, True, probe())
    except EnvironmentMismatchError as error:
        return CheckResult(name, False, str(error))
    except (ImportError, OSError, WanxError) as error:
        return CheckResult(name, False, f"{error}; reinstall wanx")


def _memory() -> str:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return "memory unknown"
    return f"{total / 1e9:.0f} GB of memory"


def _onnxruntime() -> str:
    from wanx.runtime.onnxruntime_packages import installed_packages, package_fault

    packages = installed_packages()
    if fault := package_fault(packages):
        raise EnvironmentMismatchError(fault)
    runtime = importlib.import_module("onnxruntime")
    try:
        names, product = runtime.get_available_providers(), f"onnxruntime {runtime.__version__}"
    except AttributeError as error:  # Python imports a folder that has lost its files, too
        raise EnvironmentMismatchError(
            f"{error}, since files of it are missing: "
            "pip install --force-reinstall --no-deps onnxruntime"
        ) from error
    if in_use := [package for package in packages if package.intact]:
        product = str(in_use[-1])
        if below := [str(package) for package in packages if not package.intact]:
            product += f" (its files replace those of {', '.join(below)})"
    providers = ", ".join(name.removesuffix("ExecutionProvider") for name in names)
    return f"{product} with {providers}"


def _plug_ins() -> CheckResult:
    from wanx.runtime.onnxruntime_packages import PLUG_INS, plug_in_version

    versions = {extra: plug_in_version(extra) for extra in PLUG_INS}
    found = [f"{PLUG_INS[extra]} {number}" for extra, number in versions.items() if number]
    missing = [
        f"{extra} (pip install 'wanx[{extra}]')"
        for extra, number in versions.items()
        if not number and (extra != "tensorrt-rtx" or sys.platform == "linux")
    ]
    parts = [", ".join(found), f"not installed: {', '.join(missing)}" if missing else ""]
    return CheckResult("plug-ins", bool(found), "; ".join(filter(None, parts)), required=False)


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


def _export() -> CheckResult:
    from wanx.exporter.packages import PACKAGES

    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            detail = f"{package} is not installed; pip install 'wanx[export]' to export"
            return CheckResult("export", False, detail, required=False)
    return CheckResult("export", True, ", ".join(versions), required=False)


def _hub() -> CheckResult:
    try:
        number = version("huggingface_hub")
    except PackageNotFoundError:
        detail = "huggingface_hub is not installed; pip install 'wanx[hub]' to download"
        return CheckResult("hub", False, detail, required=False)
    from huggingface_hub import constants, get_token

    facts = [
        f"huggingface_hub {number}",
        f"cache {constants.HF_HUB_CACHE}",
        "with a token" if get_token() else "no token",
        "offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else f"from {constants.ENDPOINT}",
    ]
    return CheckResult("hub", True, ", ".join(facts), required=False)


def _gpu() -> CheckResult:
    """Ask nvidia-smi, which takes no second where PyTorch takes several to import."""
    query = "name,compute_cap,driver_version"
    listing = ""
    if tool := shutil.which("nvidia-smi"):
        command = [tool, f"--query-gpu={query}", "--format=csv,noheader"]
        with suppress(OSError, subprocess.SubprocessError):
            process = subprocess.run(
                command, capture_output=True, text=True, timeout=20, check=True
            )
            listing = process.stdout
    gpus = [[part.strip() for part in row.split(",")] for row in listing.splitlines()]
    descriptions = [
        f"{name} (SM{capability.replace('.', '')}, driver {driver})"
        for name, capability, driver in (row for row in gpus if len(row) == 3)
    ]
    if not descriptions:
        return CheckResult(
            "gpu", False, "no NVIDIA GPU found; --target cpu needs none", required=False
        )
    return CheckResult("gpu", True, ", ".join(descriptions), required=False)


def _compiler() -> CheckResult:
    for name in ("g++", "clang++"):
        if shutil.which(name):
            return CheckResult("c++", True, f"{name}, which --target aoti calls", required=False)
    detail = "no g++ or clang++; --target aoti needs one (apt install g++)"
    return CheckResult("c++", False, detail, required=False)


def _leftovers(folder: Path) -> CheckResult:
    from wanx.commands.leftovers import find_leftovers

    paths = find_leftovers(folder)
    if not paths:
        return CheckResult("leftovers", True, "no files of killed commands here", required=False)
    names = ", ".join(path.name for path in paths[:10])
    more = f" and {len(paths) - 10} more" if len(paths) > 10 else ""
    detail = f"killed commands left {names}{more}; the next wanx run or export here removes them"
    return CheckResult("leftovers", False, detail, required=False)


def _print(results: Sequence[CheckResult]) -> None:
    from rich.table import Table
    from rich.text import Text

    from wanx.commands.display.generation import STDOUT

    table = Table(box=None, pad_edge=False, show_header=False)
    for result in results:
        mark = Text("ok", "green") if result.ok else Text("no", "red" if result.required else "")
        table.add_row(mark, result.name, Text(result.detail))
    STDOUT.print(table)
