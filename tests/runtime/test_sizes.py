"""Valid sizes pass and have whole latents; wrong ones are answered with the nearest valid ones."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from math import floor
from typing import Any

import numpy as np
import pytest

from wanx.config.models import PRESETS, ModelConfig, VAEConfig
from wanx.errors import UsageError
from wanx.runtime.sizes import check_size, control_shape, latent_shape, size_for_image

CONFIG = PRESETS["t2v-1.3B"]


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_defaults_are_valid(config: ModelConfig) -> None:
    check_size(config.defaults.width, config.defaults.height, config.defaults.frames, config)


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ((832, 480, 81), (16, 21, 60, 104)),
        ((1280, 720, 81), (16, 21, 90, 160)),
        ((720, 1280, 1), (16, 1, 160, 90)),
        ((16, 16, 5), (16, 2, 2, 2)),
        ((48, 16, 9), (16, 3, 2, 6)),
    ],
)
def test_latent_shape(size: tuple[int, int, int], shape: tuple[int, int, int, int]) -> None:
    check_size(*size, CONFIG)
    assert latent_shape(*size, CONFIG.vae) == shape


def test_token_counts_of_the_reference() -> None:
    for width, height, tokens in [(832, 480, 32_760), (1280, 720, 75_600)]:
        _, time, rows, columns = latent_shape(width, height, 81, VAEConfig())
        assert time * rows * columns // 4 == tokens


def message(width: int, height: int, frames: int) -> str:
    with pytest.raises(UsageError) as caught:
        check_size(width, height, frames, CONFIG)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("value", "nearest"),
    [
        (850, "848 or 864"),
        (833, "832 or 848"),
        (847, "832 or 848"),
        (8, "16"),
        (1, "16"),
        (0, "16"),
        (-16, "16"),
        (-5, "16"),
    ],
)
def test_wrong_width_or_height(value: int, nearest: str) -> None:
    rule = "must be a multiple of 16 and at least 16"
    assert message(value, 480, 81) == f"width {rule}, not {value}: use {nearest}"
    assert message(832, value, 81) == f"height {rule}, not {value}: use {nearest}"


@pytest.mark.parametrize(
    ("value", "nearest"),
    [
        (80, "77 or 81"),
        (82, "81 or 85"),
        (2, "1 or 5"),
        (4, "1 or 5"),
        (0, "1"),
        (-3, "1"),
        (-7, "1"),
    ],
)
def test_wrong_frames(value: int, nearest: str) -> None:
    expected = f"frames must be 4n+1 and at least 1, not {value}: use {nearest}"
    assert message(832, 480, value) == expected


def test_every_wrong_value_is_named() -> None:
    text = message(850, 481, 80)
    assert "width" in text
    assert "height" in text
    assert "frames" in text
    assert text.count("; ") == 2


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 2, 4), (3, 1, 2)])
@pytest.mark.parametrize("downsample", [(False, True, True), (True, False, False), (False,) * 3])
def test_accepted_sizes_are_those_with_whole_patches(
    patch: tuple[int, int, int], downsample: tuple[bool, ...]
) -> None:
    """Brute force over small sizes, for other strides and patches too."""
    vae = replace(CONFIG.vae, temporal_downsample=downsample)
    config = replace(CONFIG, vae=vae, dit=replace(CONFIG.dit, patch_size=patch))
    accepted = 0
    for width, height, frames in [(w, 32, f) for w in range(0, 70, 4) for f in range(-2, 27)]:
        whole_latent = width > 0 < frames and width % 8 == 0 == (frames - 1) % vae.temporal_stride
        _, *sizes = latent_shape(width, height, frames, vae)
        whole_patches = all(size % side == 0 for size, side in zip(sizes, patch, strict=True))
        try:
            check_size(width, height, frames, config)
        except UsageError:
            assert not (whole_latent and whole_patches), (width, frames)
        else:
            assert (whole_latent, whole_patches) == (True, True), (width, frames)
            accepted += 1
    assert accepted > 0


I2V = PRESETS["i2v-14B"]


@pytest.mark.parametrize(
    ("image", "area", "video"),
    [
        ((832, 480), 832 * 480, (832, 464)),  # executed with the reference; see wan21.md
        ((1280, 720), 1280 * 720, (1280, 720)),
        ((720, 1280), 1280 * 720, (720, 1280)),
        ((1, 1), 832 * 480, (624, 624)),
        ((4000, 3000), 832 * 480, (720, 544)),
        ((3000, 4000), 1280 * 720, (816, 1104)),
        ((800, 100), 832 * 480, (1776, 208)),
    ],
)
def test_size_for_image(image: tuple[int, int], area: int, video: tuple[int, int]) -> None:
    assert size_for_image(image[1], image[0], area, I2V) == video


@pytest.mark.parametrize("on_the_edge", [False, True])
def test_size_for_image_follows_the_rule(on_the_edge: bool) -> None:
    """On the edge: the area is the image's own, and rounding decides whether a patch is lost."""
    generator = np.random.default_rng(0)
    for _ in range(2000):
        height, width = generator.integers(500, 4000, 2).tolist()
        area = [832 * 480, 1280 * 720][height % 2]
        if on_the_edge:
            height, width = height // 16 * 16, width // 16 * 16
            area = height * width
        ratio = np.float64(height) / np.float64(width)
        rows = round(np.sqrt(area * ratio) // 8 // 2 * 2) * 8
        columns = round(np.sqrt(area / ratio) // 8 // 2 * 2) * 8
        assert size_for_image(height, width, area, I2V) == (columns, rows)
        check_size(columns, rows, 81, I2V)
        assert area * 0.9 < rows * columns <= area * (1 + 1e-9)


@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 4), (2, 3, 1)])
def test_size_for_image_with_other_patches(patch: tuple[int, int, int]) -> None:
    config = replace(I2V, dit=replace(I2V.dit, patch_size=patch))
    for height, width in [(41, 41), *((500, side) for side in range(200, 1200, 50))]:
        video = size_for_image(height, width, 640 * 480, config)
        check_size(*video, patch[0] * 4 - 3, config)
        assert video[0] / video[1] == pytest.approx(width / height, rel=0.15)


def test_size_for_image_is_never_below_one_patch() -> None:
    assert size_for_image(1, 8, 1, I2V) == (16, 16)
    assert size_for_image(100, 800, 32 * 32, I2V) == (80, 16)
    assert size_for_image(800, 100, 32 * 32, I2V) == (16, 80)


def by_the_reference(height: int, width: int, area: int) -> tuple[int, int]:
    ratio = np.float64(height) / np.float64(width)
    rows = round(np.sqrt(area * ratio) // 8 // 2 * 2) * 8
    columns = round(np.sqrt(area / ratio) // 8 // 2 * 2) * 8
    return columns, rows


@pytest.mark.parametrize("area", [832 * 480, 1280 * 720])
@pytest.mark.parametrize(("long", "short"), [(9, 1), (801, 100), (20, 1), (3000, 50), (250, 1)])
def test_size_for_a_long_and_thin_image(
    long: int, short: int, area: int, caplog: pytest.LogCaptureFixture
) -> None:
    for height, width in ((long, short), (short, long)):
        caplog.clear()
        video = size_for_image(height, width, area, I2V)
        assert video == by_the_reference(height, width, area)
        check_size(*video, 81, I2V)
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert f"the image is {width}x{height}, longer and thinner" in record.getMessage()


def test_no_warning_up_to_8(caplog: pytest.LogCaptureFixture) -> None:
    size_for_image(100, 800, 832 * 480, I2V)
    size_for_image(800, 100, 832 * 480, I2V)
    assert not caplog.records


@pytest.mark.parametrize(
    ("long", "short", "area", "patches"),
    [
        (1000, 1, 832 * 480, (1248, 1)),  # more positions than the reference embeds
        (60_000, 1, 832 * 480, (9674, 0)),
        (2000, 100, 64 * 64, (17, 0)),  # a side of no patch
    ],
)
def test_size_for_an_extreme_image(
    long: int, short: int, area: int, patches: tuple[int, int]
) -> None:
    for height, width in ((long, short), (short, long)):
        columns, rows = patches if width > height else patches[::-1]
        expected = f"the image is {width}x{height}, .* {columns}x{rows} patches, .*; crop it"
        with pytest.raises(UsageError, match=expected):
            size_for_image(height, width, area, I2V)


VACE = PRESETS["vace-14B"]
AT_480P = {"area": 480 * 832, "max_tokens": 32_760, "config": VACE}
AT_720P = {"area": 720 * 1280, "max_tokens": 75_600, "config": VACE}
RNG = np.random.default_rng(0)


# Worked out by hand from the rule.
@pytest.mark.parametrize(
    ("given", "limits", "expected"),
    [
        ((81, 480, 832), AT_480P, (81, 480, 832)),
        ((200, 480, 832), AT_480P, (81, 480, 832)),
        ((200, 832, 480), AT_480P, (81, 832, 480)),
        ((200, 1080, 1920), AT_480P, (81, 480, 832)),
        ((200, 1080, 1920), AT_720P, (81, 720, 1280)),
        ((200, 64, 64), AT_480P, (197, 64, 64)),
        ((9999, 64, 64), AT_480P, (4 * 2046 + 1, 64, 64)),
        ((1, 480, 832), AT_480P, (1, 480, 832)),
        ((4, 480, 832), AT_480P, (1, 480, 832)),
        ((5, 480, 832), AT_480P, (5, 480, 832)),
        ((5, 495, 847), AT_480P, (5, 480, 832)),
        ((81, 480, 832), {**AT_480P, "max_tokens": 1000}, (1, 384, 656)),
        # 3.90625 tokens a frame: 2 rows of 1, where 3 tokens would be 1 row of 3.
        ((81, 480, 832), {**AT_480P, "area": 1000}, (81, 32, 16)),
        # 256 latent frames of 3.90625 tokens would fit, but each gets a whole number, 3.
        ((9999, 480, 832), {**AT_480P, "area": 1000, "max_tokens": 1000}, (1021, 16, 48)),
    ],
)
def test_control_shape(
    given: tuple[int, int, int], limits: dict[str, Any], expected: tuple[int, int, int]
) -> None:
    shape = control_shape(*given, **limits)
    assert shape == expected
    assert all(type(side) is int for side in shape)


def test_control_shape_follows_the_rule_in_exact_arithmetic() -> None:
    for _ in range(2000):
        frames, height, width = (int(RNG.integers(*ends)) for ends in ((1, 400), *[(16, 3000)] * 2))
        limits = AT_720P if RNG.integers(2) else {**AT_480P, "area": int(RNG.integers(9e3, 4e5))}
        limit, area = limits["max_tokens"], Fraction(limits["area"])
        most = min(limit, area / 256, (height // 16) * (width // 16))
        times = min((frames - 1) // 4 + 1, floor(limit / most))
        tokens = min(most, limit // times)
        try:
            made, rows, columns = control_shape(frames, height, width, **limits)
        except UsageError:  # floor(tokens / rows) is 0
            assert max(height, width) > 16 * min(height, width)
            continue
        assert made == 4 * (times - 1) + 1
        # rows / 16 is the whole number nearest to the root of tokens · h/w.
        quadrupled = 4 * tokens * Fraction(height, width)
        assert (2 * rows // 16 - 1) ** 2 <= quadrupled <= (2 * rows // 16 + 1) ** 2
        assert columns == 16 * floor(tokens / (rows // 16))
        assert (rows % 16, times * rows * columns <= 256 * limit) == (0, True)


def test_control_shape_takes_the_strides_of_the_model() -> None:
    config = replace(
        VACE,
        dit=replace(VACE.dit, patch_size=(2, 1, 4)),
        vae=replace(VACE.vae, temporal_downsample=(True, False, False)),
    )
    # One token is 4 frames of 8x32 pixels: 40 of them, in 8 rows of 5 or so.
    shape = control_shape(11, 64, 160, area=10**6, max_tokens=10**6, config=config)
    assert shape == (9, 32, 320)
    config = replace(VACE, vae=replace(VACE.vae, temporal_downsample=(False,) * 3))
    assert control_shape(9, 64, 160, **{**AT_480P, "config": config}) == (9, 64, 160)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ((0, 64, 64), "0 frames"),
        ((5, 15, 64), "64x15"),
        ((5, 64, 15), "15x64"),
        ((5, 16, 160_000), "160000x16"),
        ((5, 160_000, 16), "16x160000"),
    ],
)
def test_control_shape_refuses_what_is_too_small(given: tuple[int, int, int], found: str) -> None:
    with pytest.raises(UsageError, match=rf"the control video (has|is) {found}") as caught:
        control_shape(*given, **AT_480P)
    assert "\n" not in str(caught.value)
