"""The pages: the code in docs runs, links lead somewhere, the tree is the tree."""

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


def test_architecture_lists_every_module() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    tree = page.partition("## The tree")[2].partition("\n## ")[0]
    found: set[str] = set()
    folders: list[str] = []
    for indent, name in re.findall(r"^ {4}( *)(\S+)", tree, re.M):
        folders[len(indent) // 2 :] = [name.removesuffix("/")]
        if name.endswith(".py"):
            found.add("/".join(folders))
    paths = (path.relative_to(ROOT).as_posix() for path in (ROOT / "wanx").rglob("*.py"))
    expected = {path for path in paths if not re.search("/.*/__init__.py", path)}
    assert found == expected
