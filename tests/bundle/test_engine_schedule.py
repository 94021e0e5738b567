"""The schedule's file, whose names are those of the first version."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from wanx.bundle.engine_schedule import EngineSchedule, Program, Step, read_schedule
from wanx.errors import CorruptInputError

WRITTEN_BEFORE = {
    "schema_version": 1,
    "compiler": "torch 2.10.0",
    "device": "sm90",
    "types": {"tokens": "BF16"},
    "batched": ["tokens"],
    "batch_limit": 2048,
    "programs": {"block": {"file": "block.pt2", "weights": [], "layers": {}}},
    "steps": [{"program": "block", "prefix": "", "inputs": ["tokens"], "outputs": ["tokens"]}],
}
SCHEDULE = EngineSchedule(
    compiler="torch 2.10.0",
    device="sm90",
    input_dtypes={"tokens": "BF16"},
    batched=("tokens",),
    max_batched_tokens=2048,
    programs={"block": Program(file="block.pt2", weights=())},
    steps=(Step(program="block", inputs=("tokens",), outputs=("tokens",)),),
)


def test_the_format_is_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(WRITTEN_BEFORE))
    assert read_schedule(file) == SCHEDULE
    assert SCHEDULE.to_json() == json.dumps(WRITTEN_BEFORE, indent=1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"types": {}}, "reads tokens, which nothing makes"),
        ({"types": {"tokens": "I4"}}, "types.tokens"),
        ({"batch_limit": -1}, "batch_limit"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_problems_are_told_by_the_names_in_the_file(
    tmp_path: Path, change: dict[str, object], words: str
) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(WRITTEN_BEFORE | change))
    with pytest.raises(CorruptInputError, match=words):
        read_schedule(file)
