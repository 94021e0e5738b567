"""The default shift by task and size, as the reference's generate.py chooses it."""

from __future__ import annotations

import numpy as np
import pytest

from wanx.config.models import PRESETS
from wanx.runtime.inputs.reading import Inputs
from wanx.runtime.options import RunOptions
from wanx.runtime.resolve import resolve


@pytest.mark.parametrize(
    ("model", "size", "shift"),
    [
        ("i2v-14B", (832, 480), 3.0),
        ("i2v-14B", (480, 832), 3.0),
        ("i2v-14B", (624, 624), 3.0),
        ("i2v-14B", (1280, 720), 5.0),
        ("i2v-14B", (720, 1280), 5.0),
        ("i2v-14B", (None, None), 5.0),
        ("t2v-1.3B", (832, 480), 5.0),
        ("t2v-14B", (1280, 720), 5.0),
        ("t2v-14B", (832, 480), 5.0),
        ("flf2v-14B", (832, 480), 16.0),
        ("flf2v-14B", (1280, 720), 16.0),
        ("vace-1.3B", (832, 480), 16.0),
        ("tiny-i2v", (64, 64), 3.0),
    ],
)
def test_default_shift(model: str, size: tuple[int | None, int | None], shift: float) -> None:
    options = RunOptions(prompt="a", width=size[0], height=size[1])
    assert resolve(options, PRESETS[model], Inputs()).shift == shift


def test_the_size_asked_for_counts_and_not_that_of_the_image() -> None:
    image = np.zeros((100, 700, 3), np.uint8)
    options = RunOptions(prompt="a", width=832, height=480)
    assert resolve(options, PRESETS["i2v-14B"], Inputs(image=image)).shift == 3.0
    options = RunOptions(prompt="a", width=1280, height=720)
    assert resolve(options, PRESETS["i2v-14B"], Inputs(image=image)).shift == 5.0


@pytest.mark.parametrize("shift", [1.0, 5.0, 16.0])
def test_a_shift_that_is_given_stays(shift: float) -> None:
    options = RunOptions(prompt="a", width=832, height=480, shift=shift)
    assert resolve(options, PRESETS["i2v-14B"], Inputs()).shift == shift


@pytest.mark.parametrize("model", ["t2v-1.3B", "i2v-14B"])
def test_an_empty_negative_prompt_stays_empty(model: str) -> None:
    config = PRESETS[model]
    assert (
        resolve(RunOptions(prompt="a", negative_prompt=""), config, Inputs()).negative_prompt == ""
    )
    default = resolve(RunOptions(prompt="a"), config, Inputs()).negative_prompt
    assert default == config.defaults.negative_prompt != ""
