"""``wanx run --memory`` and ``--dry-run``: what a person types and reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.support.command_line import Wanx
from wanx.runtime import run_plan
from wanx.runtime.memory import plan

PROMPT = "a red circle moving right on a blue background"
WIDE = (PROMPT, "--size", "640x640", "--frames", "9", "--provider", "cpu")


def test_a_dry_run(wanx: Wanx, tmp_path: Path) -> None:
    code, out, err = wanx("run", *WIDE, "--dry-run", "--memory", "500M", "-q")
    assert (code, err) == (0, "")
    first, head, *rows = out.splitlines()
    assert first == "640x640, 9 frames, 20 steps, guidance scale 2.5"
    assert head.split() == ["stage", "time", "memory", "of", "it", "mapped", "tiles"]
    assert [row.split()[0] for row in rows] == ["text", "denoise", "decode"]
    assert all("about" in row for row in rows)
    assert "times the work" in rows[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_for_programs(wanx: Wanx) -> None:
    code, out, _ = wanx("run", *WIDE, "--dry-run", "--memory", "500M", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["options"]["width"] == 640
    assert [stage["name"] for stage in facts["stages"]] == ["text", "denoise", "decode"]
    assert all(
        0 <= stage["mapped_bytes"] < stage["bytes"] <= 500 << 20 for stage in facts["stages"]
    )
    assert facts["stages"][-1]["tiles"] > 1 < facts["stages"][-1]["work"]
    assert all(stage["seconds"] > 0 for stage in facts["stages"])


def test_a_stage_of_two_networks_is_one_row(wanx: Wanx, tmp_path: Path) -> None:
    image = tmp_path / "red.png"
    Image.new("RGB", (64, 64), "red").save(image)
    code, out, _ = wanx("run", "tiny-i2v", PROMPT, "--image", str(image), "--dry-run", "--json")
    assert code == 0
    names = [stage["name"] for stage in json.loads(out)["stages"]]
    assert names == ["text", "condition", "denoise", "decode"]


def test_networks_that_run_elsewhere(wanx: Wanx, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is said of their memory and time."""
    monkeypatch.setattr(plan, "_stages", lambda *arguments: iter(()))
    monkeypatch.setattr(run_plan, "stage_seconds", lambda *arguments: {})
    code, out, _ = wanx("run", PROMPT, "--dry-run")
    assert code == 0
    assert "whose memory and time are not predicted" in out


@pytest.mark.fault("a budget of memory")
@pytest.mark.parametrize("budget", ["8", "0", "", "8GB", "-1G", "1.5G"])
def test_no_size(budget: str, wanx: Wanx) -> None:
    outcome = wanx("run", PROMPT, f"--memory={budget}")
    assert outcome.code == 2
    assert f"--memory {budget} is not a size; give one such as 12G" in outcome.error


@pytest.mark.fault("a budget of memory")
@pytest.mark.parametrize("dry", [True, False])
def test_too_little(dry: bool, wanx: Wanx, tmp_path: Path) -> None:
    arguments = ["--dry-run"] if dry else []
    outcome = wanx("run", *WIDE, "--memory", "100M", *arguments, "-q")
    assert outcome.code == 2
    assert "more than --memory 100M allows; give --memory " in outcome.error
    assert list(tmp_path.iterdir()) == []


def test_options_that_do_not_go_together(wanx: Wanx, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(PROMPT)
    outcome = wanx("run", "--prompts", "p.txt", "--dry-run")
    assert outcome.code == 2
    assert "--dry-run and --prompts do not go together" in outcome.error
