"""Targets: one row each for those that build and those that run."""

from __future__ import annotations

import pytest

from wanx.errors import UsageError
from wanx.exporter.targets.registry import TARGETS, parse_target
from wanx.runtime.sessions.registry import BACKENDS


def test_what_is_built_can_be_run() -> None:
    assert TARGETS.keys() == BACKENDS.keys()
    for name in TARGETS:
        assert parse_target(name).name == name


def test_gpus_are_no_part_of_the_name() -> None:
    assert parse_target("rtx:sm89,sm120").name == "rtx"
    assert parse_target("tensorrt:sm80+").name == "tensorrt"


@pytest.mark.parametrize("text", ["tpu", "", "cpu:sm89", "aoti:sm89", "cpu:", "rtxx:sm89", ":"])
def test_unknown_targets(text: str) -> None:
    with pytest.raises(
        UsageError, match=f"--target {text} is not available; choose cpu, cuda, openvino, aoti, rt"
    ):
        parse_target(text)
