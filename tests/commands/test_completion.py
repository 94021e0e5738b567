"""The tab key: what bash offers, and that installing it changes no more than it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from wanx.builtin import BUILTIN
from wanx.commands.completion import (
    complete_bundle,
    complete_precision,
    complete_solver,
    complete_target,
    complete_task,
)
from wanx.errors import UsageError

# A program of that name on the PATH, as pip installs it.
SHIM = f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m wanx "$@"\n'


@pytest.fixture
def home(tmp_path: Path) -> Path:
    program = tmp_path / "bin" / "wanx"
    program.parent.mkdir()
    program.write_text(SHIM)
    program.chmod(0o755)
    return tmp_path


def bash(home: Path, script: str, **environment: str) -> str:
    """Run a script in a fresh home folder; return what it prints."""
    path = f"{home / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", f"{script}\nexit $?"],
        env=os.environ | {"HOME": str(home), "PATH": path} | environment,
        cwd=home, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def offered(home: Path, line: str) -> list[str]:
    """Ask for completions as the shell does; the cursor is at the end of ``line``."""
    position = str(len(line.split(" ")) - 1)
    return bash(
        home, "wanx", COMP_WORDS=line, COMP_CWORD=position, _WANX_COMPLETE="complete_bash"
    ).split()


def test_commands_and_options(home: Path) -> None:
    assert offered(home, "wanx ver") == ["verify"]
    assert offered(home, "wanx run --neg") == ["--negative-prompt"]
    assert "--show-completion" in offered(home, "wanx --")


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("wanx run t", ["tiny", "tiny-i2v"]),
        ("wanx compare tiny tiny-", ["tiny-i2v"]),
        ("wanx bench --baseline tiny-", ["tiny-i2v"]),
        ("wanx run --solver d", ["dpm++"]),
        ("wanx export tiny --precision fp1", ["fp16"]),
        ("wanx export --target a", ["aoti"]),
        ("wanx build tiny --target r", ["rtx"]),
        ("wanx export --task v", ["vace"]),
        ("wanx run tiny a-prompt", []),  # the shell then offers files
    ],
)
def test_values(home: Path, line: str, values: list[str]) -> None:
    assert offered(home, line) == values


def test_bundles_are_offered_where_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mine", "store/t2v-14b", "store/i2v-14b"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "manifest.json").touch()
    (tmp_path / "store" / "t2v-checkpoint").mkdir()
    monkeypatch.chdir(tmp_path)
    assert complete_bundle("") == [*BUILTIN, "mine"]
    assert complete_bundle("store/t") == ["store/t2v-14b"]
    assert complete_bundle(f"{tmp_path}/store/") == [
        f"{tmp_path}/store/i2v-14b",
        f"{tmp_path}/store/t2v-14b",
    ]
    assert complete_bundle("no/such/folder/t") == []


def test_what_is_offered_is_what_there_is() -> None:
    from wanx.exporter.options import ExportOptions
    from wanx.exporter.targets.registry import TARGETS
    from wanx.runtime.options import RunOptions

    assert complete_target("") == list(TARGETS)
    for precision in complete_precision(""):
        ExportOptions(precision=precision)
    with pytest.raises(UsageError) as refusal:
        ExportOptions(precision="int2")
    assert str(refusal.value).partition("choose ")[2].split(", ") == complete_precision("")
    for solver in complete_solver(""):
        RunOptions(solver=solver)
    assert complete_task("") == ["t2v", "i2v", "flf2v", "vace"]


def test_completing_imports_no_pytorch(home: Path) -> None:
    words = {"COMP_WORDS": "wanx export --precision f", "COMP_CWORD": "3"}
    imported = bash(
        home, "wanx 2>&1", PYTHONPROFILEIMPORTTIME="1", _WANX_COMPLETE="complete_bash", **words
    )
    assert "wanx.config.number_formats\n" in imported
    assert " torch\n" not in imported


def test_installing_it_for_bash(home: Path) -> None:
    said = bash(home, "wanx --install-completion")
    installed = home / ".bash_completions" / "wanx.sh"
    assert str(installed) in said
    assert (home / ".bashrc").read_text().strip() == f"source '{installed}'"
    # And then bash completes.
    script = (
        "source ~/.bashrc\n"
        "COMP_WORDS=(wanx run --solver u)\n"
        "COMP_CWORD=3\n"
        "_wanx_completion wanx\n"
        'echo "${COMPREPLY[@]}"\n'
        "complete -p wanx"
    )
    assert bash(home, script).splitlines() == [
        "unipc",
        "complete -o default -F _wanx_completion wanx",
    ]


def test_showing_it_writes_nothing(home: Path) -> None:
    assert "complete -o default -F _wanx_completion wanx" in bash(home, "wanx --show-completion")
    assert [path.name for path in home.iterdir()] == ["bin"]


def test_the_environment_never_installs_it(home: Path) -> None:
    bash(home, "wanx inspect tiny", WANX_INSTALL_COMPLETION="1", WANX_VERSION="1.0")
    assert [path.name for path in home.iterdir()] == ["bin"]
