"""docs/performance.md is what its stored measurements say."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import performance
import pytest

UNITS = re.compile(r"\d[\d.,]*\s*(s|ms|min|[kMGT]B|[GT]FLOP(/s)?|dB|%)\b")


def test_the_page_is_up_to_date() -> None:
    assert performance.PAGE.read_text(encoding="utf-8") == performance.render()


def test_no_figure_is_typed() -> None:
    """The template has goals and commands, but nothing that was measured."""
    template = performance.TEMPLATE.read_text(encoding="utf-8")
    text = re.sub(r"\{\{.*?\}\}|\{%.*?%\}|^    .*$", "", template, flags=re.S | re.M)
    typed, _, _ = text.partition("## GPU")  # which lists what is missing, with its goals
    typed = re.sub(r"goals?[^.]*\.[\d ]", "", typed, flags=re.I)
    assert [match[0] for match in UNITS.finditer(typed) if match[0] != "1.5 GB"] == []


def test_every_measurement_has_its_command_and_machine() -> None:
    for path in performance.stored():
        document = json.loads(path.read_text(encoding="utf-8"))
        assert {"command", "environment", "created"} <= document.keys(), path
        assert "cpu" in document["environment"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234.5, "1,230"), (123.45, "123"), (12.345, "12.3"), (1.2, "1.20"), (0.05678, "0.0568"),
        (2.0, "2.00"), (100.0, "100"), (0.0, "0"),
    ],
)  # fmt: skip
def test_digits(value: float, text: str) -> None:
    assert performance.digits(value) == text


def test_a_tool_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(performance, "MEASUREMENTS", tmp_path)
    performance.record("it", ["python", "-c", "print('words'); print('{\"seconds\": 2.5}')"])
    document = json.loads((tmp_path / "it.json").read_text())
    assert document["figures"] == {"seconds": 2.5}
    assert document["command"].startswith("python -c ")
    assert sys.executable not in document["command"]
