"""What a model is calibrated on: the shipped prompts, a user's file, and synthetic pictures."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.paths import ROOT
from wanx.builtin import builtin_bundle
from wanx.config.models import PRESETS
from wanx.errors import CorruptInputError, UsageError, WanxError
from wanx.exporter.calibration.prompts import calibration_set, natural_image
from wanx.runtime.options import RunOptions
from wanx.runtime.text import PromptTokenizer

T2V, I2V, FLF2V = PRESETS["tiny"], PRESETS["tiny-i2v"], PRESETS["tiny-flf2v"]


def written(folder: Path, *lines: Any) -> Path:
    path = folder / "prompts.jsonl"
    text = "\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines)
    path.write_text(text, encoding="utf-8")
    return path


def tiny_data() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tiny_data", ROOT / "tools" / "tiny" / "data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


def test_shipped_prompts_of_a_full_size_model() -> None:
    runs = calibration_set(None, PRESETS["t2v-14B"])
    prompts = [run.prompt or "" for run in runs]
    assert len(set(prompts)) == 16
    chinese = [p for p in prompts if any("\u4e00" <= c <= "\u9fff" for c in p)]
    words = [len(p.split()) for p in prompts if p not in chinese]
    assert len(chinese) >= 3
    assert min(words) <= 6 < 60 <= max(words) <= 80
    assert len({run.seed for run in runs}) == 16
    assert runs == calibration_set(None, PRESETS["t2v-14B"])


def test_shipped_prompts_of_the_tiny_model_are_in_its_language() -> None:
    data = tiny_data()
    trained, _ = data.split_scenes()  # the others are what accuracy is measured on
    scenes = {scene.caption: scene for scene in trained}
    runs = calibration_set(None, T2V)
    shown = [scenes[run.prompt or ""] for run in runs]
    assert len(set(shown)) == 12
    for field, known in (
        ("shape", data.SHAPES),
        ("colour", data.COLOURS),
        ("direction", data.DIRECTIONS),
        ("background", data.BACKGROUNDS),
    ):
        assert {getattr(scene, field) for scene in shown} == set(known), field
    tokenizer = PromptTokenizer(builtin_bundle() / "tokenizer" / "tokenizer.json")
    # A word each, and the end: none fell apart into characters.
    assert [tokenizer.encode(run.prompt or "")[1].sum() for run in runs] == [10] * 12


@pytest.mark.parametrize("preset", ["tiny", "tiny-i2v", "tiny-flf2v", "tiny-vace"])
def test_shipped_prompts_suit_every_task(preset: str) -> None:
    runs = calibration_set(None, PRESETS[preset], limit=5)
    assert [run.prompt for run in runs] == [r.prompt for r in calibration_set(None, T2V)][:5]
    images = [run.image for run in runs]
    if preset in ("tiny", "tiny-vace"):
        assert images == [None] * 5
        return
    for run in runs:
        assert isinstance(run.image, np.ndarray)
        assert (run.image.shape, run.image.dtype) == ((64, 64, 3), np.uint8)
        if preset == "tiny-i2v":
            assert run.last_image is None
        else:
            assert isinstance(run.last_image, np.ndarray)
            assert np.array_equal(run.last_image[:, 8:], run.image[:, :-8])
            assert not np.array_equal(run.last_image, run.image)
    assert len({np.asarray(image).tobytes() for image in images}) == 5


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    Image.new("RGB", (80, 64)).save(tmp_path / "cat.png")
    file = written(
        tmp_path,
        {"prompt": "一只猫", "image": "cat.png", "negative_prompt": "n", "guide_scale": 3},
        "",
        {"prompt": "a", "size": "80x48", "seed": 7},
        {"prompt": "b", "output": "b.mp4"},
    )
    first, second, third = calibration_set(file, I2V)
    assert first == RunOptions(
        prompt="一只猫", negative_prompt="n", guide_scale=3, seed=0, image=tmp_path / "cat.png"
    )
    assert (second.seed, third.seed) == (7, 2)
    assert np.asarray(second.image).shape == (48, 80, 3)
    assert np.asarray(third.image).shape == (64, 64, 3)
    assert calibration_set(file, I2V, limit=1) == [first]
    assert len(calibration_set(file, I2V, limit=99)) == 3


def test_a_long_file_shares_its_pictures(tmp_path: Path) -> None:
    runs = calibration_set(written(tmp_path, *[{"prompt": "a"}] * 100), FLF2V)
    assert len({id(run.image) for run in runs}) < 20
    assert len({id(run.last_image) for run in runs}) < 20
    assert {run.seed for run in runs} == set(range(100))


@pytest.mark.parametrize(
    ("line", "error", "words"),
    [
        ("{", CorruptInputError, "cannot read its JSON"),
        ("[1]", CorruptInputError, "instead of an object"),
        ('{"seed": 1, "seed": 2}', CorruptInputError, "twice"),
        ({"promt": "a"}, UsageError, "'promt' is not an option"),
        ({"prompt": 3}, UsageError, "prompt is 3; give a text"),
        ({"prompt": "a", "width": 65}, UsageError, "width must be a multiple of 16"),
        ({"prompt": "a", "steps": 0}, UsageError, "steps is 0"),
        ({"prompt": "a\0"}, UsageError, "NUL"),
        ({"prompt": "a", "image": "cat.png"}, UsageError, "a bundle for t2v takes no --image"),
        ({"prompt": "a", "video": "cat.mp4"}, UsageError, "a bundle for t2v takes no --video"),
        ({"prompt": "a", "references": ["r.png"]}, UsageError, "for t2v takes no --reference"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: Any, error: type[WanxError], words: str) -> None:
    file = written(tmp_path, {"prompt": "a"}, "", line)
    with pytest.raises(error) as caught:
        calibration_set(file, T2V)
    message = str(caught.value)
    assert message.startswith(f"line 3 of {file}: ")
    assert words in message
    assert message.count(str(file)) == 1
    assert "\n" not in message
    assert len(calibration_set(file, T2V, limit=1)) == 1


@pytest.mark.parametrize(
    ("line", "error", "words"),
    [
        ({"image": "none.png", "prompt": "a"}, UsageError, "none.png does not exist"),
        ({"image": "damaged.png", "prompt": "a"}, CorruptInputError, "damaged.png"),
        ({"image": "good.png"}, UsageError, "no prompt"),
        ({"prompt": "a", "last_image": "good.png"}, UsageError, "takes no --last-image"),
        ({"prompt": "a", "size": "65536x65536"}, UsageError, "65536x65536 have a latent of"),
    ],
)
def test_images_are_looked_at_before_anything_runs(
    tmp_path: Path, line: Any, error: type[WanxError], words: str
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "good.png")
    (tmp_path / "damaged.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    with pytest.raises(error, match=words) as caught:
        calibration_set(written(tmp_path, {"prompt": "a"}, line), I2V)
    assert str(caught.value).startswith("line 2 of ")


@pytest.mark.parametrize(("given", "lacks"), [("image", "--last-image"), ("last_image", "--image")])
def test_one_image_of_two_is_not_made_up(tmp_path: Path, given: str, lacks: str) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "good.png")
    with pytest.raises(UsageError, match=f"for flf2v needs {lacks}"):
        calibration_set(written(tmp_path, {"prompt": "a", given: "good.png"}), FLF2V)


def test_files_that_are_no_set(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    for data, words in ((b"", "no lines"), (b"\n \n", "no lines"), (b'{"\xff": 1}', "UTF-8")):
        path.write_bytes(data)
        with pytest.raises(UsageError, match=words):
            calibration_set(path, T2V)
    for path in (tmp_path / "nothing.jsonl", tmp_path):
        with pytest.raises(UsageError, match="not there or not a file"):
            calibration_set(path, T2V)
    for limit in (0, -1):
        with pytest.raises(UsageError, match=f"is {limit}; choose 1 or more"):
            calibration_set(None, T2V, limit=limit)


@pytest.mark.parametrize(("height", "width"), [(256, 256), (130, 301), (480, 832)])
def test_spectrum_of_a_picture_falls_as_one_over_f(height: int, width: int) -> None:
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    edges = np.geomspace(0.03, 0.35, 9)
    ring = np.digitize(frequency, edges)
    slopes = []
    for seed in range(6):
        grey = natural_image(seed, height, width).mean(-1)
        power = np.abs(np.fft.fft2(grey - grey.mean())) ** 2
        amplitude = [np.sqrt(power[ring == i].mean()) for i in range(1, len(edges))]
        centres = np.sqrt(edges[1:] * edges[:-1])
        slopes.append(np.polyfit(np.log(centres), np.log(amplitude), 1)[0])
    assert -1.2 < np.mean(slopes) < -0.85, slopes


def test_pictures_are_varied_and_repeatable() -> None:
    pictures = [natural_image(seed, 48, 81) for seed in range(8)]
    assert all(np.array_equal(p, natural_image(s, 48, 81)) for s, p in enumerate(pictures))
    assert len({picture.tobytes() for picture in pictures}) == 8
    for picture in pictures:
        assert picture.shape == (48, 81, 3)
        assert 60 < picture.mean() < 200
        assert picture.std() > 25
        assert ((picture == 0) | (picture == 255)).mean() < 0.15
        assert picture.astype(float).std(axis=-1).mean() > 3  # coloured


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (16, 16), (17, 2)])
def test_the_smallest_pictures(height: int, width: int) -> None:
    assert natural_image(3, height, width).shape == (height, width, 3)
