"""The rules by which figures are judged, and the command that stores them."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import accuracy_envelopes
import envelopes
import figures
import pytest
from drawings import Drawings
from envelopes import KINDS, Envelope, enclose, judge, read_envelopes, table, write_envelopes
from figures import Measured

BEFORE = {
    "int8": {
        "golden cosine": 0.999,
        "layers kept high": 3.0,
        "object seen": 90.0,
        "clip PSNR": 30.0,
    }
}


def verdicts(now: dict[str, dict[str, float]]) -> dict[str, str]:
    return {row.name: row.verdict for row in judge(enclose(BEFORE), now)}


@pytest.mark.parametrize(
    ("name", "value", "verdict"),
    [
        ("golden cosine", 0.999, "ok"),
        ("golden cosine", 0.99890, "ok"),
        ("golden cosine", 0.99889, "WORSE"),
        ("golden cosine", 0.9992, "better"),
        ("golden cosine", math.nan, "WORSE"),
        ("layers kept high", 5.0, "ok"),
        ("layers kept high", 6.0, "WORSE"),
        ("layers kept high", 1.0, "ok"),
        ("layers kept high", 0.0, "better"),
        ("object seen", 87.5, "ok"),
        ("object seen", 87.4, "WORSE"),
        ("object seen", 92.6, "better"),
        ("clip PSNR", 3.0, "reported"),
    ],
)
def test_verdicts(name: str, value: float, verdict: str) -> None:
    now = {"int8": BEFORE["int8"] | {name: value}}
    same = dict.fromkeys(BEFORE["int8"], "ok") | {"clip PSNR": "reported"}
    assert verdicts(now) == same | {name: verdict}


def test_what_is_on_one_side_only_fails() -> None:
    now = {"int8": {"golden cosine": 0.999, "golden SQNR": 28.0}, "fp8": {"clip PSNR": 30.0}}
    rows = judge(enclose(BEFORE), now)
    found = {(row.precision, row.name): (row.verdict, row.passed) for row in rows}
    assert found == {
        ("int8", "golden cosine"): ("ok", True),
        ("int8", "layers kept high"): ("NOT MEASURED", False),
        ("int8", "object seen"): ("NOT MEASURED", False),
        ("int8", "clip PSNR"): ("NOT MEASURED", False),
        ("int8", "golden SQNR"): ("NOT STORED", False),
        ("fp8", "clip PSNR"): ("NOT STORED", False),
    }


def test_the_table_has_every_figure() -> None:
    now = {"int8": BEFORE["int8"] | {"clip PSNR": 12.5}}
    lines = table(judge(enclose(BEFORE), now)).splitlines()
    assert [line.split() for line in lines] == [
        ["figure", "stored", "bound", "now"],
        ["int8", "golden", "cosine", "0.999", "0.998899", "0.999", "ok"],
        ["int8", "layers", "kept", "high", "3", "5", "3", "ok"],
        ["int8", "object", "seen", "90", "87.5", "90", "ok"],
        ["int8", "clip", "PSNR", "30", "-", "12.5", "reported"],
    ]


def test_every_kind_has_room_on_the_bad_side_alone() -> None:
    for name, kind in KINDS.items():
        if kind is None:
            continue
        for value in (0.5, 0.999999, 20.0, 100.0):
            bound = kind.bound(value)
            assert bound < value if kind.higher else bound > value, name


def test_envelopes_come_back_from_their_file(tmp_path: Path) -> None:
    path = tmp_path / "envelopes.json"
    assert read_envelopes(path) == {}
    write_envelopes(enclose(BEFORE), path)
    assert read_envelopes(path) == enclose(BEFORE)
    assert json.loads(path.read_text())["int8"]["object seen"] == {"value": 90.0, "bound": 87.5}
    assert json.loads(path.read_text())["int8"]["clip PSNR"] == {"value": 30.0, "bound": None}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_envelopes({"int8": {"clip PSNR": Envelope(value=math.nan, bound=0.0)}}, path)


def test_nothing_is_written_unless_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "envelopes.json"
    write_envelopes(enclose(BEFORE), path)
    before = path.read_bytes()
    now = Measured(
        figures=BEFORE["int8"] | {"golden cosine": 0.99},
        golden=(), comparison=None, drawings=Drawings(pairs=()),
    )  # fmt: skip
    monkeypatch.setattr(figures, "measure_all", lambda export, folder: {"int8": now})
    monkeypatch.setattr(envelopes, "STORED", path)
    monkeypatch.setattr(sys, "argv", ["accuracy_envelopes.py"])
    accuracy_envelopes.main()
    printed = capsys.readouterr().out
    assert "golden cosine" in printed
    assert "WORSE" in printed
    assert "1 of 4 figures" in printed
    assert path.read_bytes() == before
    monkeypatch.setattr(sys, "argv", ["accuracy_envelopes.py", "--write"])
    accuracy_envelopes.main()
    assert read_envelopes(path)["int8"]["golden cosine"].value == 0.99
