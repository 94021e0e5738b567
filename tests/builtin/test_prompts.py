"""What the built-in models say of prompts that they were not trained on."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from typer.testing import CliRunner

import wanx
from tests.support.paths import ROOT
from wanx.builtin import BUILTIN, open_named
from wanx.builtin.prompts import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    PROMPT_HINT,
    SHAPES,
    prompt_hint,
    prompt_warning,
    unknown_words,
)
from wanx.cli import app

OTHERS = {
    "a cat": ["cat"],
    "a blue square moving left on a green background": ["green background"],
    "a white circle moving up on a black background": ["white"],
    "a circle on a background": ["a background"],
    "A RED Circle, moving RIGHT!": [],
    "a pink cat, a pink dog": ["pink", "cat", "dog"],
    "一只猫 surfing": ["一只猫", "surfing"],
    "a\u2028red\x1b[31m circle": ["31m"],
    "a cercle café": ["cercle", "café"],
    "": [],
    "...": [],
}


@pytest.mark.parametrize(("prompt", "unknown"), OTHERS.items())
def test_words_that_no_training_prompt_has(prompt: str, unknown: list[str]) -> None:
    assert unknown_words(prompt) == unknown


@pytest.mark.parametrize("name", BUILTIN)
@pytest.mark.parametrize("prompt", OTHERS)
def test_a_warning_is_one_plain_line_that_says_what_is_known(name: str, prompt: str) -> None:
    warning = prompt_warning(open_named(name).manifest, prompt * 100)
    assert (warning is None) == (unknown_words(prompt * 100) == [])
    if warning is not None:
        assert warning.isprintable()
        assert len(warning) < 500
        assert PROMPT_HINT in warning


def test_the_default_prompt_is_known() -> None:
    manifest = open_named("tiny").manifest
    assert manifest.defaults.prompt is not None
    assert prompt_warning(manifest, manifest.defaults.prompt) is None


def test_another_model_is_not_spoken_of() -> None:
    manifest = open_named("tiny").manifest
    renamed = replace(manifest.config, name="wan2.1-t2v-1.3b")
    other_words = {
        path: record.model_copy(update={"sha256": "0" * 64})
        for path, record in manifest.files.items()
    }
    for changes in ({"config": renamed}, {"files": other_words}, {"files": {}}):
        assert prompt_hint(manifest.model_copy(update=changes)) is None
        assert prompt_warning(manifest.model_copy(update=changes), "a cat") is None


def test_a_run_warns_once_on_stderr_and_its_json_stays_json(tmp_path: object) -> None:
    for prompt, lines in (("a cat", 1), ("a red circle moving left on a white background", 0)):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "wanx", "run", "tiny", prompt, "-q", "--json", "--steps=1"),
                *("--frames=5", "--count=2", "--threads=1", f"--output={tmp_path}/v.mp4"),
            ],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert len(json.loads(done.stdout)) == 2
        assert len(done.stderr.splitlines()) == lines


@pytest.mark.parametrize("name", BUILTIN)
def test_inspect_says_which_prompts_are_known(name: str) -> None:
    assert PROMPT_HINT in CliRunner().invoke(app, ["inspect", name]).output
    facts = json.loads(CliRunner().invoke(app, ["inspect", name, "--json"]).output)
    assert facts["prompts"] == PROMPT_HINT
    assert "prompts" not in wanx.inspect(name).manifest.model_dump()


def test_help_and_readme_have_every_word() -> None:
    pages = CliRunner().invoke(app, ["run", "--help"]).output, (ROOT / "README.md").read_text()
    for page in pages:
        words = set(page.replace(",", " ").replace(";", " ").replace(".", " ").split())
        assert {*SHAPES, *COLOURS, *DIRECTIONS, *BACKGROUNDS} <= words
