"""The command ``wanx compare``: what it prints, writes and returns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import wanx.benchmarks.report.html as html_module
import wanx.runtime.run_parts as run_parts_module
from tests.support.altered import altered_bundle, noise
from tests.support.command_line import Wanx

SMALL = ["--steps", "3", "--frames", "5", "--size", "32x48", "--seed", "3", "--threads", "1"]


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("noisy") / "noisy"
    return altered_bundle(folder, "dit", noise(0.5), prefix="blocks.").root


def test_equal_bundles(wanx: Wanx, tmp_path: Path) -> None:
    code, out, err = wanx("compare", "tiny", "tiny", *SMALL, "--gate", "-q")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    for output in ("velocity, conditional", "velocity, unconditional", "text features, conditional",
                   "decoded frames"):  # fmt: skip
        (line,) = (line for line in lines if line.startswith(output))
        assert "1.000000" in line
        assert "equal" in line
    assert any(line.startswith("run 1") and "(0x)" in line for line in lines)
    assert lines[-1] == "accurate enough"
    assert list(tmp_path.iterdir()) == []


def test_the_gate(wanx: Wanx, noisy: Path, tmp_path: Path) -> None:
    code, out, err = wanx("compare", noisy, "tiny", *SMALL, "--gate", "-q", "-o", "report")
    assert code == 3
    (line,) = err.splitlines()
    assert "not accurate enough" in line
    assert "at step " in line
    assert out.splitlines()[-1] == "not accurate enough"
    report = tmp_path / "report"
    document = json.loads((report / "accuracy.json").read_text())
    worst = min(
        (s for s in document["runs"][0]["steps"] if s["branch"] == "conditional"),
        key=lambda s: s["cosine"],
    )
    assert f"at step {worst['step']} " in line
    (row,) = (row for row in out.splitlines() if row.startswith("velocity, conditional"))
    assert f"{worst['cosine']:.6f}" in row
    assert row.endswith(f"step {worst['step']}")
    assert (report / "accuracy.html").stat().st_size > 10_000

    code, again, err = wanx("compare", noisy, "tiny", *SMALL, "-q")
    assert (code, err) == (0, "")
    assert "fails" in again


def test_json_and_no_clips(wanx: Wanx, noisy: Path) -> None:
    code, out, _ = wanx(
        "compare", noisy, "tiny", *SMALL, "--no-clips", "--json", "--prompt", "a blue square"
    )
    assert code == 0
    document = json.loads(out)
    assert document["passed"] is False
    (run,) = document["runs"]
    assert run["clip"] is None
    assert run["options"]["prompt"] == "a blue square"
    assert [run["options"][name] for name in ("width", "height", "frames", "steps", "seed")] == [
        32, 48, 5, 3, 3,
    ]  # fmt: skip
    code, out, _ = wanx("compare", "tiny", "tiny", *SMALL, "--no-clips")
    assert code == 0
    assert "RMSE" not in out


def test_several_prompts(wanx: Wanx, noisy: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a circle"}\n{"prompt": "a square", "steps": 2}')
    code, out, _ = wanx("compare", noisy, "tiny", *SMALL, "--prompts", "p.jsonl")
    assert code == 0
    assert [line.split()[1] for line in out.splitlines() if line.startswith("run ")] == ["1", "2"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["tiny-i2v", "tiny"], 2, "different models: task is i2v"),
        (["tiny", "nowhere"], 2, "does not exist"),
        (["tiny", "tiny", "--prompt", "a", "--prompts", "p.jsonl"], 2, "do not go together"),
        (["tiny", "tiny", "--size", "30x30"], 2, "use 16 or 32"),
        (["tiny", "tiny", "--prompts", "p.jsonl"], 2, "p.jsonl is not there"),
        (["tiny-i2v", "tiny-i2v"], 2, "--prompts"),
    ],
)
def test_refused_in_one_line(arguments: list[str], code: int, message: str, wanx: Wanx) -> None:
    got, out, err = wanx("compare", *arguments, "-q")
    assert (got, out) == (code, "")
    (line,) = err.splitlines()
    assert message in line


def test_a_report_without_its_packages_fails_before_anything_runs(
    wanx: Wanx, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(html_module, "find_spec", lambda name: None)
    monkeypatch.setattr(run_parts_module, "open_session", None)
    code, _, err = wanx("compare", "tiny", "tiny", *SMALL, "-o", "report")
    assert code == 4
    assert "pip install 'wanx[report]'" in err
    assert list(tmp_path.iterdir()) == []
