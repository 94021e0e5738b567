"""Exports where PyTorch is not installed: of known networks, as they are."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT
from tools.synthesize import synthesize
from wanx.bundle.golden_steps import GOLDEN
from wanx.bundle.reader import open_bundle
from wanx.config.models import PRESETS, ModelConfig
from wanx.exporter.export import export
from wanx.exporter.options import ExportOptions

# Python takes a module that is None for one that is not installed.
PROGRAM = """
import sys
for name in ("torch", "onnxscript"):
    sys.modules[name] = None
from wanx.cli import main
sys.argv = ["wanx", *sys.argv[1:]]
main()
"""


def wanx(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, timeout=600, check=False,
    )  # fmt: skip


def facts(bundle: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((bundle / "manifest.json").read_bytes())
    return manifest


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "fp16"])
def test_the_built_in_model(precision: str, tmp_path: Path) -> None:
    """The same bundle as with it, golden steps included: they come with the source."""
    done = wanx("export", "--precision", precision, "-o", tmp_path / "light", "-q")
    assert (done.returncode, done.stderr) == (0, "")
    export(ExportOptions(output=tmp_path / "full", precision=precision))
    light = facts(tmp_path / "light")
    assert light["components"] == facts(tmp_path / "full")["components"]
    assert light["files"] == facts(tmp_path / "full")["files"]


def known(preset: str) -> ModelConfig:
    """A preset whose VAE has the statistics that files of the original layout leave unsaid."""
    return replace(PRESETS[preset], vae=PRESETS["t2v-14B"].vae)


@pytest.mark.parametrize("preset", ["tiny", "tiny-vace"])
def test_a_checkpoint(preset: str, tmp_path: Path) -> None:
    synthesize(known(preset), tmp_path / "source")
    done = wanx("export", tmp_path / "source", "-o", tmp_path / "light")
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "golden" in line)
    assert line.endswith(
        "no golden steps are recorded, which takes torch, onnxscript: wanx verify will check "
        "hashes alone; pip install 'wanx[export]' for both"
    )
    assert not (tmp_path / "light" / GOLDEN).exists()
    done = wanx("verify", tmp_path / "light")
    assert done.returncode == 0, done.stderr
    assert open_bundle(tmp_path / "light").manifest.config.dit == PRESETS[preset].dit


@pytest.mark.parametrize(
    ("options", "purpose"),
    [
        (["--precision", "int8"], "quantise"),
        (["--precision", "fp8"], "quantise"),
        (["--target", "aoti"], "build engines"),
        (["--no-graph-cache"], "list the tensors of"),
    ],
)
def test_what_needs_it_says_so(options: list[str], purpose: str, tmp_path: Path) -> None:
    done = wanx("export", *options, "-o", tmp_path / "bundle", "-q")
    assert done.returncode == 4
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: to {purpose}")
    assert "takes torch, onnxscript, which this environment lacks: pip install 'wanx[exp" in line
    assert list(tmp_path.iterdir()) == []


def test_a_gate_needs_steps(tmp_path: Path) -> None:
    synthesize(known("tiny"), tmp_path / "source")
    done = wanx("export", tmp_path / "source", "--gate", "-o", tmp_path / "bundle", "-q")
    assert done.returncode == 4
    assert "to record the golden steps that --gate runs takes torch, onnxscript" in done.stderr
    assert not (tmp_path / "bundle").exists()
