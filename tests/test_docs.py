"""The pages: the code in docs runs, links and paths lead somewhere."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from wanx.builtin import builtin_bundle

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *DOCS]
BLOCKS = {
    f"{page.name}-{number}": block
    for page in DOCS
    for number, block in enumerate(
        re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.M)
    )
}


@pytest.mark.parametrize("name", BLOCKS)
def test_python_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(builtin_bundle(), "demo-bundle")
    exec(compile(BLOCKS[name], name, "exec"), {"__name__": name})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if not target.startswith("https://")]
    assert [target for target in local if not (page.parent / target).exists()] == []


# A path below one of these folders, wherever a page speaks of it; * stands for any name.
NAMED = re.compile(r"(?<![\w./-])(?:\.ci|\.github|benchmarks|docs|tests|tools|wanx)/[\w./*-]*\w")
MODULE = re.compile(r"-m ((?:benchmarks|wanx)\b[\w.]*)")
CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md"]


def missing(text: str) -> list[str]:
    """Paths and modules of the repository that a text names and that are not there."""
    paths = [path for path in NAMED.findall(text) if not any(ROOT.glob(path))]
    modules = []
    for module in MODULE.findall(text):
        path = ROOT / module.replace(".", "/")
        if not (path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()):
            modules.append(module)
    return paths + modules


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: page.name)
def test_paths_are_in_the_tree(page: Path) -> None:
    assert missing(page.read_text(encoding="utf-8")) == []


def test_what_is_not_in_the_tree_is_seen() -> None:
    text = "`wanx/cli.py` tests/*/test_cli.pyx https://host/docs/x.md python -m wanx.bundle"
    assert missing(text) == ["tests/*/test_cli.pyx", "wanx.bundle"]
