"""What may import what, what an installation without extras can do, and what the wheel holds."""

from __future__ import annotations

import ast
import email
import json
import re
import resource
import statistics
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from importlib.metadata import distribution, packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import wanx
from tests.support.paths import ROOT

PACKAGE = ROOT / "wanx"
MODULES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = {"benchmarks", "export", "kernels", "models", "runtime"}
EXPORTER = {"export", "kernels", "models"}

# The packages beyond the standard library that a folder may import, and the parts of wanx.
EXTERNAL = {
    "benchmarks": {"PIL", "jinja2", "markupsafe", "matplotlib", "numpy", "pydantic", "pynvml"},
    "kernels": {"cudnn", "fa3_fwd_interface", "onnxscript", "torch", "triton"},
    "runtime": {"PIL", "av", "ftfy", "numpy", "onnxruntime", "platformdirs", "tokenizers"},
}
INTERNAL = {
    "benchmarks": {
        "",
        "benchmarks",
        "builtin",
        "bundle",
        "config",
        "errors",
        "golden",
        "manifest",
        "progress",
        "runtime",
    },
    "kernels": {"errors", "kernels"},
    "models": {"config", "errors", "input_file", "kernels", "models", "safetensors_file"},
    "runtime": {
        *("", "bundle", "carried_kernel", "config", "engine_plan", "errors", "input_file"),
        *("memory_size", "progress", "runtime", "safetensors_file", "trust"),
    },
}
# What runs PyTorch's compiled packages and what measures kernels; nothing else there imports them.
WITH_TORCH = {
    *(PACKAGE / "runtime" / "sessions" / name for name in ("aoti.py", "aoti_engine.py")),
    *(PACKAGE / "benchmarks" / "gpu").glob("*.py"),
    *(PACKAGE / "benchmarks" / "peers").glob("*.py"),
}
# What counts operations in graphs and finds the machine's limits, where the package onnx is there.
WITH_ONNX = {
    PACKAGE / "benchmarks" / "speed" / name
    for name in ("ceilings.py", "cost.py", "parts.py", "profile.py", "shapes.py")
}
# What talks to CUDA, imported when a session on a GPU is opened.
WITH_CUDA = {PACKAGE / "runtime" / "sessions" / name for name in ("cuda.py", "tensorrt_launch.py")}
# The modules beside the folders that may import them: the API, the command line and what it shows.
FRONT = {
    *(
        "__init__",
        "__main__",
        "cli",
        "cli_bench",
        "cli_build",
        "cli_compare",
        "cli_export",
        "cli_options",
    ),
    *("cli_run", "doctor", "rendering", "rendering_accuracy", "rendering_speed"),
}

NEVER_AT_RUNTIME = {
    *("torch", "onnx", "onnxscript", "onnx_ir", "ml_dtypes"),
    *("wanx.export", "wanx.kernels", "wanx.models"),
}
HEAVY = NEVER_AT_RUNTIME | {
    *("PIL", "av", "ftfy", "numpy", "onnxruntime", "pydantic", "safetensors", "tokenizers"),
    "wanx.runtime",
}

GUARD = """
import json, sys
from pathlib import Path

report, absent = json.loads(sys.argv.pop())
asked = []

class Guard:
    def find_spec(self, name, path=None, target=None):
        if name in absent:
            asked.append(name)
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None

sys.meta_path.insert(0, Guard())
try:
    exec(compile(sys.stdin.read(), "<guarded>", "exec"), {"__name__": "__guarded__"})
finally:
    Path(report).write_text(json.dumps(asked))
"""


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere, in functions and for the type checker too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            yield from (n.value for n in node.args if isinstance(n, ast.Constant))


def own_part(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def part(name: str) -> str | None:
    """The folder or module of wanx that an import refers to; "" is wanx itself, None another."""
    first, *rest = name.split(".")
    if first != "wanx":
        return None
    is_module = rest and ((PACKAGE / rest[0]).is_dir() or (PACKAGE / f"{rest[0]}.py").exists())
    return rest[0] if is_module else ""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_layers(path: Path) -> None:
    names = set(imports(path))
    parts = {found for name in names if (found := part(name)) is not None}
    packages = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"wanx"}
    own = own_part(path)
    if path in WITH_TORCH:
        packages -= {"accelerate", "diffusers", "safetensors", "torch", "transformers"}
        if own == "benchmarks":
            parts -= {"engine_plan", "export", "kernels", "models"}
    if path in WITH_CUDA:
        packages -= {"cuda"}
    if path in WITH_ONNX:
        packages -= {"onnx", "onnxruntime"}
    if own in INTERNAL:
        assert parts <= INTERNAL[own]
    elif own == "export":
        assert not parts & {"cli", "rendering"}
    elif own not in FRONT:
        assert not parts & (FOLDERS | FRONT)
    if own in EXTERNAL:
        assert packages <= EXTERNAL[own]
    elif own not in FOLDERS:
        assert not packages & NEVER_AT_RUNTIME


def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found: dict[str, Any] = table["project"]
    return found


def normalised(distribution_name: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution_name).lower()


def runtime_distributions() -> set[str]:
    """The runtime dependencies and what they depend on themselves."""
    todo = [Requirement(line) for line in project()["dependencies"]]
    found: set[tuple[str, frozenset[str]]] = set()
    while todo:
        requirement = todo.pop()
        key = (normalised(requirement.name), frozenset(requirement.extras))
        if key in found:
            continue
        found.add(key)
        extras = {"", *requirement.extras}
        for needed in map(Requirement, distribution(requirement.name).requires or ()):
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in extras):
                todo.append(needed)
    return {name for name, _ in found}


@pytest.fixture(scope="module")
def extras() -> set[str]:
    """Top-level modules that `pip install wanx` alone would not install."""
    plain = {"wanx", *runtime_distributions()}
    installed = packages_distributions().items()
    return {name for name, owners in installed if plain.isdisjoint(map(normalised, owners))}


def run_without(absent: set[str], code: str, tmp_path: Path) -> set[str]:
    """Run code where some modules do not exist; return which of them it asked for.

    Asking shows even where the code then goes on without, as ``try: import torch`` does.
    """
    report = tmp_path / "asked.json"
    done = subprocess.run(
        [sys.executable, "-c", GUARD, json.dumps([str(report), sorted(absent)])],
        input=code, text=True, capture_output=True, cwd=ROOT, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return set(json.loads(report.read_text()))


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_the_guard_sees_what_code_swallows(tmp_path: Path) -> None:
    code = "try:\n    import torch.nn\nexcept ImportError:\n    pass\nimport wanx.errors"
    assert run_without(NEVER_AT_RUNTIME, code, tmp_path) == {"torch"}


def test_the_guard_fails_what_code_needs(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="No module named 'torch'"):
        run_without({"torch"}, "import wanx.models.dit.model", tmp_path)


def import_all(paths: Iterable[Path]) -> str:
    return "\n".join(f"import {dotted(path)}" for path in paths)


def test_runtime_never_asks_for_the_exporter(tmp_path: Path, extras: set[str]) -> None:
    paths = [path for path in MODULES if own_part(path) == "runtime" and path not in WITH_TORCH]
    asked = run_without(NEVER_AT_RUNTIME | extras, import_all(paths), tmp_path)
    assert asked.isdisjoint(NEVER_AT_RUNTIME)


def test_everything_but_the_exporter_imports_without_extras(
    tmp_path: Path, extras: set[str]
) -> None:
    assert {"torch", "onnx", "onnxscript", "diffusers", "pytest"} <= extras
    assert extras.isdisjoint({"wanx", "numpy", "onnxruntime", "google"})
    paths = [p for p in MODULES if own_part(p) not in EXPORTER and p not in WITH_TORCH]
    asked = run_without(extras, import_all(paths), tmp_path)
    assert asked.isdisjoint(NEVER_AT_RUNTIME)


def test_a_run_needs_no_extras(tmp_path: Path, extras: set[str]) -> None:
    code = (
        "import wanx\n"
        "pipeline = wanx.load(threads=1)\n"
        "made = pipeline('a red circle', width=64, height=64, frames=5, steps=2, seed=0)\n"
        "assert made.frames.shape == (5, 64, 64, 3)\n"
    )
    asked = run_without(NEVER_AT_RUNTIME | extras, code, tmp_path)
    assert asked.isdisjoint(NEVER_AT_RUNTIME)


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from wanx.cli import main\n"
        "sys.argv = ['wanx', '--help']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as ending:\n"
        "    assert ending.code in (0, None), ending.code\n"
    )
    assert run_without(HEAVY, code, tmp_path) == set()


def test_help_takes_less_than_400_ms() -> None:
    def seconds(*arguments: str) -> float:
        # Processor time: other work on the machine hardly changes it, unlike the time on the wall.
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    taken = [(seconds("-m", "wanx", "--help"), seconds("-c", "pass")) for _ in range(5)]
    wanx_help, python = (statistics.median(times) for times in zip(*taken, strict=True))
    # An idle machine starts Python in 0.03 s; a slower start is this machine's, not ours.
    assert wanx_help < 0.4 + max(0.0, python - 0.03), taken


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    folder = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        capture_output=True, text=True, cwd=ROOT, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = folder.iterdir()
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    expected = {path.relative_to(ROOT).as_posix() for path in files}
    assert {"wanx/py.typed", "wanx/builtin/tiny/manifest.json"} <= expected
    metadata = f"wanx-{wanx.__version__}.dist-info/"
    held = set(wheel.namelist())
    assert {name for name in held if not name.startswith(metadata)} == expected
    assert f"{metadata}licenses/LICENSE" in held


def test_wheel_metadata_agrees_with_the_package(wheel: zipfile.ZipFile) -> None:
    folder = f"wanx-{wanx.__version__}.dist-info"
    metadata = email.message_from_bytes(wheel.read(f"{folder}/METADATA"))
    assert metadata["Version"] == wanx.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    plain = {normalised(r.name) for r in requirements if r.marker is None}
    assert plain == {normalised(Requirement(line).name) for line in project()["dependencies"]}
    assert "torch" not in plain
    assert "wanx = wanx.cli:main" in wheel.read(f"{folder}/entry_points.txt").decode()


def test_every_dependency_has_a_tested_version() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in pins)
    versions = {normalised(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    wanted = project()
    groups = [wanted["dependencies"], *wanted["optional-dependencies"].values()]
    for requirement in (Requirement(line) for group in groups for line in group):
        if requirement.name != "wanx":
            assert requirement.specifier.contains(versions[normalised(requirement.name)])
