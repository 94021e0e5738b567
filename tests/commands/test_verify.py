"""Golden steps on the command line: ``wanx verify``, and the options of ``wanx export``."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import wanx.accuracy.golden_check as judge
import wanx.exporter.export as exporter
from tests.support.altered import altered_bundle, noise
from tests.support.command_line import Wanx
from tests.support.golden_bundles import Case, golden_case, update_hashes, with_golden_steps
from wanx.accuracy.golden_check import check_golden
from wanx.builtin import builtin_bundle
from wanx.bundle.golden_steps import GOLDEN
from wanx.bundle.reader import Bundle, open_bundle


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """A bundle for a task; tests must not change it."""
    folder = tmp_path_factory.mktemp("golden")
    return functools.cache(lambda task: golden_case(folder / task, task))


@pytest.fixture(scope="module")
def noisy(case: Callable[[str], Case], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The text-to-video model with other weights, and the golden steps of its own ones."""
    folder = tmp_path_factory.mktemp("noisy") / "noisy"
    return with_golden_steps(
        altered_bundle(folder, "dit", noise(0.5), prefix="blocks."), case("t2v").golden
    )


def test_verify_prints_them(wanx: Wanx, case: Callable[[str], Case]) -> None:
    code, out, err = wanx("verify", case("t2v").bundle.root, "--threads", "1", "-q")
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines() if line.strip().endswith("dB")]
    assert [(row[0], row[3], row[4]) for row in rows] == [
        (step, branch, "1.000000")
        for step in "12" for branch in ("conditional", "unconditional")
    ]  # fmt: skip


def test_verify_as_json(wanx: Wanx, case: Callable[[str], Case]) -> None:
    bundle = case("t2v").bundle
    code, out, _ = wanx("verify", bundle.root, "--json", "--threads", "1")
    document = json.loads(out)
    assert code == 0
    found = check_golden(bundle, threads=1)
    assert [(s["step"], s["branch"], s["cosine"]) for s in document["golden_steps"]] == [
        (step.step, step.branch, step.cosine) for step in found
    ]
    assert all(check["problem"] is None for check in document["files"])
    assert GOLDEN in [check["path"] for check in document["files"]]


@pytest.mark.parametrize("as_json", [False, True])
def test_verify_of_a_bundle_that_is_not_accurate(as_json: bool, wanx: Wanx, noisy: Bundle) -> None:
    code, out, err = wanx("verify", noisy.root, "--threads", "1", "-q", *["--json"] * as_json)
    assert code == 3
    (line,) = err.splitlines()
    assert "4 of 4 golden steps are below the gate" in line
    if as_json:
        assert len(json.loads(out)["golden_steps"]) == 4
    else:
        assert out.count("conditional") == 4


def test_verify_without_golden_steps(
    wanx: Wanx, noisy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "check_golden", None)  # nothing may call it
    code, out, err = wanx("verify", noisy.root, "--no-golden", "-q")
    assert (code, err) == (0, "")
    assert "golden step" not in out
    assert json.loads(wanx("verify", noisy.root, "--no-golden", "--json")[1])["golden_steps"] == []


def test_a_bundle_without_golden_steps(
    wanx: Wanx, case: Callable[[str], Case], tmp_path: Path
) -> None:
    shutil.copytree(case("t2v").bundle.root, tmp_path / "bundle")
    bundle = with_golden_steps(open_bundle(tmp_path / "bundle"), None)
    assert check_golden(bundle) == ()
    code, out, err = wanx("verify", bundle.root, "-q")
    assert (code, err) == (0, "")
    assert "golden" not in out


@pytest.mark.parametrize("damaged", [GOLDEN, "weights/dit.safetensors", "graphs/dit.onnx"])
def test_damage_comes_before_accuracy(
    damaged: str, wanx: Wanx, noisy: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(noisy.root, tmp_path / "bundle")
    path = tmp_path / "bundle" / damaged
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr(judge, "check_golden", None)  # nothing may call it
    code, out, _ = wanx("verify", "bundle", "--json")
    assert code == 5
    document = json.loads(out)
    assert [c["path"] for c in document["files"] if c["problem"] is not None] == [damaged]
    assert document["golden_steps"] == []


def test_golden_steps_that_are_none_of_any(wanx: Wanx, noisy: Bundle, tmp_path: Path) -> None:
    """Signed, so that nothing but reading them can tell."""
    shutil.copytree(noisy.root, tmp_path / "bundle")
    (tmp_path / "bundle" / GOLDEN).write_bytes(b"steps")
    update_hashes(tmp_path / "bundle")
    code, _, err = wanx("verify", "bundle", "-q")
    assert code == 5
    (line,) = err.splitlines()
    assert "holds no golden steps" in line


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Export text encoder and denoiser, and no VAE."""
    monkeypatch.setattr(
        exporter,
        "component_groups",
        lambda config: {"text_encoder": "text_encoder", "dit": "dit"},
    )


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("steps", [0, 1])
def test_export_with_so_many_steps(steps: int, wanx: Wanx, tmp_path: Path) -> None:
    few = ["--calibration-size", "32x32", "--calibration-frames", "5", "--gate"] if steps else []
    code, _, _ = wanx("export", "tiny", "-o", "bundle", "-q", "--golden-steps", steps, *few)
    assert code == 0
    assert (tmp_path / "bundle" / GOLDEN).exists() == (steps == 1)
    assert len(check_golden(open_bundle(tmp_path / "bundle"), threads=1)) == 2 * steps


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("there_before", [False, True])
def test_the_gate_publishes_nothing(there_before: bool, wanx: Wanx, tmp_path: Path) -> None:
    """Half of all activations are clipped, and no layer is kept high for it."""
    before = {}
    if there_before:
        shutil.copytree(builtin_bundle("tiny"), tmp_path / "bundle")
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, out, err = wanx(
        "export", "tiny", "-o", "bundle", "--precision", "int8", "--gate", "-q", "--force",
        "--percentile", "50", "--layer-gate", "-100", "--golden-steps", "2", "--quantize", "dit",
        "--calibration-size", "32x32", "--calibration-frames", "5", "--calibration-prompts", "1",
        "--calibration-steps", "2",
    )  # fmt: skip
    assert (code, out) == (3, "")
    (line,) = err.splitlines()
    assert re.search("[1-4] of 4 golden steps are below the gate", line)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
