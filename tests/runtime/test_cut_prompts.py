"""Prompts beyond the model's length: said once, and kept with the video."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from typer.testing import CliRunner

import wanx
from wanx.builtin import builtin_bundle
from wanx.cli import app
from wanx.runtime.options import RunOptions
from wanx.runtime.output.provenance import read_metadata
from wanx.runtime.text import clean_prompt

WORDS = "a red circle moving right on a blue background, "
FAST = {"steps": 1, "width": 32, "height": 32, "frames": 1, "seed": 1}


def whole_length(prompt: str) -> int:
    """By the tokenizers library alone."""
    tokenizer = Tokenizer.from_file(str(builtin_bundle("tiny") / "tokenizer" / "tokenizer.json"))
    tokenizer.no_truncation()
    return len(tokenizer.encode(clean_prompt(prompt)))


@pytest.mark.parametrize("option", ["prompt", "negative_prompt"])
@pytest.mark.fault("prompt that is cut")
def test_a_cut_prompt_is_said_once_and_kept_in_the_metadata(
    option: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = {"prompt": WORDS, "negative_prompt": "noise"} | {option: WORDS * 100}
    result = wanx.load("tiny").run(RunOptions(**FAST, **prompts), output=tmp_path / "a.png")
    tokens = whole_length(prompts[option])
    assert tokens > 512
    assert result.cut == {option: f"512 of {tokens}"}
    assert read_metadata(tmp_path / "a.png")[f"{option}_tokens"] == f"512 of {tokens}"
    (record,) = caplog.records
    assert f"the {option.replace('_', ' ')} has {tokens} tokens" in record.getMessage()


@pytest.mark.parametrize(("more", "cut"), [(0, False), (1, True)])
def test_the_last_prompt_that_fits(more: int, cut: bool, tmp_path: Path) -> None:
    words = next(n for n in range(600) if whole_length("red " * n) == 512)
    result = wanx.load("tiny").run(
        RunOptions(**FAST, prompt="red " * (words + more)), output=tmp_path / "a.png"
    )
    assert bool(result.cut) is cut
    assert ("prompt_tokens" in read_metadata(tmp_path / "a.png")) is cut


@pytest.mark.parametrize("quiet", [[], ["-q"]])
def test_the_command_line_says_it(quiet: list[str], tmp_path: Path) -> None:
    arguments = ["--steps", "1", "--size", "32x32", "--frames", "1", "-o", str(tmp_path / "a.png")]
    result = CliRunner().invoke(app, ["run", "tiny", WORDS * 100, "--json", *arguments, *quiet])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["cut"]["prompt"].startswith("512 of ")
    assert quiet or result.stderr.count("of which the first 512 are used") == 1
