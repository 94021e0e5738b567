"""What may import what, what an installation without extras can do, and what the wheel holds."""

from __future__ import annotations

import ast
import email
import graphlib
import json
import re
import resource
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

# From the top to the bottom: a part imports what stands below it, and nothing above. "" is wanx
# itself, the API.
LAYERS = (
    *("__main__", "cli", "commands", "", "benchmarks", "exporter", "models", "kernels"),
    *("checkpoints", "accuracy", "runtime", "builtin", "bundle", "hub", "files", "config"),
    *("interruption", "memory_size", "privacy", "progress", "version", "errors"),
)
# Parts that PyTorch belongs to; the installation without extras cannot import them.
EXPORTER = {"exporter", "kernels", "models", "checkpoints"}
WITH_TORCH = {
    *(PACKAGE / "runtime" / "sessions" / "aoti").glob("*.py"),
    *(PACKAGE / "benchmarks" / "peers").glob("*.py"),
    PACKAGE / "benchmarks" / "speed" / "roofline" / "gpu_peaks.py",
}

NEVER_AT_RUNTIME = {
    *("torch", "onnx", "onnxscript", "onnx_ir", "ml_dtypes"),
    *("wanx.exporter", "wanx.kernels", "wanx.models"),
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
    return part(dotted(path))


def part(module: str) -> str:
    """Folder or module of wanx below which a dotted name lies; "" is wanx itself."""
    _, *rest = module.split(".")
    return rest[0] if rest and rest[0] in LAYERS else ""


def own_imports(path: Path) -> set[str]:
    """Modules of wanx that a file imports, as dotted names."""
    known = {dotted(module) for module in MODULES}
    names = {name for name in imports(path) if name.partition(".")[0] == "wanx"}
    return {name if name in known else name.rpartition(".")[0] for name in names} & known


def test_every_part_has_a_layer() -> None:
    assert {part(dotted(path)) for path in MODULES} == set(LAYERS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    own = own_part(path)
    others = {name for name in own_imports(path) if part(name) != own}
    upward = {name for name in others if LAYERS.index(part(name)) < LAYERS.index(own)}
    assert not upward


def sibling_imports(folder: str) -> dict[str, set[str]]:
    """Of each file and folder directly in a folder, the others that it imports."""
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        name = dotted(path)
        if name.startswith(f"{folder}."):
            own = name.removeprefix(f"{folder}.").partition(".")[0]
            inside = [n for n in own_imports(path) if n.startswith(f"{folder}.")]
            others = {n.removeprefix(f"{folder}.").partition(".")[0] for n in inside}
            graph.setdefault(own, set()).update(others - {own})
    return graph


FOLDERS = sorted({".".join(path.parent.relative_to(ROOT).parts) for path in MODULES})


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_circles(folder: str) -> None:
    tuple(graphlib.TopologicalSorter(sibling_imports(folder)).static_order())


def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    section: dict[str, Any] = table["project"]
    return section


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
        input=code, text=True, capture_output=True, cwd=ROOT, timeout=600, check=False,
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
    wanx_help, python = (min(times) for times in zip(*taken, strict=True))
    # It takes about ten times as long as Python's own start, which tells how fast this machine is.
    assert wanx_help < max(0.4, 16 * python), taken


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    folder = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        capture_output=True, text=True, cwd=ROOT, timeout=600, check=False,
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
