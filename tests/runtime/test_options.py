"""Types that options of a run may have, however they come."""

from __future__ import annotations

from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import wanx
from wanx.errors import UsageError
from wanx.runtime.options import RunOptions

WHOLE = ("width", "height", "frames", "fps", "steps", "seed")
REAL = ("guide_scale", "shift", "guidance_rescale", "speedup", "vace_scale")
TEXT = ("prompt", "negative_prompt", "solver", "preset", "cache")
FLAGS = ("warp", "cfg_zero", "apg")
LISTS = ("timesteps", "sigmas")
FILES = ("image", "last_image", "video", "mask")


@pytest.mark.fault("wrong type from Python")
def test_every_option_is_checked() -> None:
    assert {*WHOLE, *REAL, *TEXT, *FLAGS, *LISTS, *FILES, "references"} == {
        f.name for f in fields(RunOptions)
    }
    for option in fields(RunOptions):
        with pytest.raises(UsageError, match=f"{option.name} is {{'a': 1}}; give "):
            RunOptions(**{option.name: {"a": 1}})  # type: ignore[arg-type]
        assert getattr(RunOptions(**{option.name: None}), option.name) == option.default  # type: ignore[arg-type]


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("four", [4, 4.0, np.int64(4), np.uint8(4), np.float32(4), Fraction(4)])
def test_whole_numbers_of_any_type(name: str, four: Any) -> None:
    value = getattr(RunOptions(**{name: four}), name)
    assert (value, type(value)) == (4, int)


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("half", [0.5, np.float16(0.5), np.float64(0.5), Fraction(1, 2)])
def test_numbers_of_any_type(name: str, half: Any) -> None:
    value = getattr(RunOptions(**{name: half}), name)
    assert (value, type(value)) == (0.5, float)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize(
    "value", ["4", b"4", 4.5, True, np.bool_(1), float("nan"), float("inf"), 4 + 0j, [4]]
)
@pytest.mark.fault("wrong type from Python")
def test_what_is_no_whole_number(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{name} is .*; give a whole number") as caught:
        RunOptions(**{name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [10**5000, -(10**5000), 1e300, 2**64], ids=range(4))
def test_numbers_too_long_to_print(value: Any) -> None:
    with pytest.raises(UsageError, match=r"seed has .* bits; give a number of 64"):
        RunOptions(seed=value)
    if value == 10**5000:
        with pytest.raises(UsageError, match="over 1e308"):
            RunOptions(shift=value)


@pytest.mark.parametrize("name", FILES)
def test_names_of_files(name: str) -> None:
    for value in ("a.png", Path("a.png")):
        assert getattr(RunOptions(**{name: value}), name) == value  # type: ignore[arg-type]
    for bad in (b"a.png", 3, ["a.png"]):
        with pytest.raises(UsageError, match=f"{name} is .*; give the name of a file"):
            RunOptions(**{name: bad})  # type: ignore[arg-type]


def test_references_are_a_list() -> None:
    pixels = np.zeros((2, 2, 3), np.uint8)
    assert RunOptions(references=["a.png", Path("b")]).references == ("a.png", Path("b"))  # type: ignore[arg-type]
    assert RunOptions(references=(pixels,)).references[0] is pixels
    for bad in ("a.png", pixels, [1], {"a.png"}):
        with pytest.raises(UsageError, match=r"references is .*; give a list of names of files"):
            RunOptions(references=bad)  # type: ignore[arg-type]


def test_errors_are_short_and_of_one_line() -> None:
    with pytest.raises(UsageError) as caught:
        RunOptions(steps=np.zeros((99, 99)))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 150


def test_the_pipeline_takes_what_the_options_take() -> None:
    pipeline = wanx.load(threads=1)
    video = pipeline(
        "a red circle", steps=1.0, width=32.0, height=np.int32(32), frames=1, seed=None
    )
    assert video.options.steps == 1
    with pytest.raises(UsageError, match="steps is '4'"):
        pipeline("a red circle", steps="4")


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize(
    "value", ["1,0.5", " 1 , .5", [1, 0.5], (1, np.float32(0.5)), np.array([1, 0.5])]
)
def test_lists_of_numbers(name: str, value: Any) -> None:
    assert getattr(RunOptions(**{name: value}), name) == (1.0, 0.5)


@pytest.mark.fault("wrong type from Python")
@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("value", ["1,,2", "a", [1, "b"], [None], 5])
def test_no_lists_of_numbers(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=name):
        RunOptions(**{name: value})
