"""The page of a comparison: what it says, that it is safe, and that it needs nothing else."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import wanx.benchmarks.accuracy.files as report_module
import wanx.benchmarks.report.html as html_module
from wanx.accuracy.gates import Agreement, Gates
from wanx.benchmarks.accuracy.clips import compare_clips
from wanx.benchmarks.accuracy.comparison import Comparison, RunComparison, Subject
from wanx.benchmarks.accuracy.files import write_accuracy
from wanx.benchmarks.accuracy.page import render
from wanx.benchmarks.report.files import prepare_folder
from wanx.errors import EnvironmentMismatchError, UsageError
from wanx.runtime.options import ResolvedRun

EVIL = '<script>alert("1")</script> --> & {{ 7 * 7 }} $x_{$'
VOID = {"meta", "img", "br", "link"}


def clip(width: int, seed: int, spread: int = 4) -> NDArray[np.uint8]:
    generator = np.random.default_rng(seed)
    base = np.arange(9 * 20 * width * 3).reshape(9, 20, width, 3) % 200 + 20
    return (base + generator.integers(-spread, spread + 1, base.shape)).astype(np.uint8)


def comparison(
    *, width: int = 33, steps: int = 4, cosine: float = 0.9995, prompt: str = "a cat"
) -> Comparison:
    subject = Subject(
        name="tiny", task="t2v", precision="int8", target="cpu", hash="ab" * 32,
        folder="candidate-folder", size_bytes=12_345_678,
    )  # fmt: skip
    options = ResolvedRun(
        prompt=prompt, negative_prompt="blurry", width=width, height=20, frames=9, fps=16,
        steps=steps, guide_scale=5.0, shift=3.0, solver="unipc", seed=77,
    )  # fmt: skip
    branches: tuple[Any, ...] = ("conditional", "unconditional")
    run = RunComparison(
        options=options,
        parts=(Agreement(component="vae_decoder", cosine=0.99987, sqnr_db=41.5),),
        steps=tuple(
            Agreement(
                component="dit", branch=branch, step=step, timestep=1000.0 - step, cosine=cosine,
                sqnr_db=30.25 + step,
            )
            for step in range(1, steps + 1)
            for branch in branches
        ),
        clip=compare_clips(clip(width, 1), clip(width, 2), clip(width, 3)),
    )  # fmt: skip
    reference = replace(subject, precision="fp32", hash="cd" * 32, folder="reference-folder")
    return Comparison(
        candidate=subject, reference=reference, gates=Gates(), runs=(run,),
        environment={"cpu": "a processor"},
    )  # fmt: skip


class Page(HTMLParser):
    """Checks that elements nest, and collects elements and texts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data

    @property
    def images(self) -> list[NDArray[np.uint8]]:
        sources = [attributes["src"] or "" for tag, attributes in self.elements if tag == "img"]
        assert all(source.startswith("data:image/") for source in sources)
        parts = [base64.b64decode(source.partition("base64,")[2]) for source in sources]
        return [np.asarray(Image.open(io.BytesIO(part))) for part in parts]


def test_it_says_what_was_measured_and_how() -> None:
    html = render(comparison(steps=11))
    page = Page(html)
    for fact in (
        "candidate-folder", "reference-folder", "int8", "fp32", "ab" * 32, "cd" * 32, "12.3 MB",
        "a cat", "blurry", "33×20", "9 frames", "11 steps of unipc", "seed 77", "a processor",
        "every gate is passed",
    ):  # fmt: skip
        assert fact in page.text, fact
    for step in range(1, 12):
        at = page.cells.index(str(1000 - step))
        assert page.cells[at - 1 : at + 4] == [
            str(step), str(1000 - step), "conditional", "0.999500", f"{30.25 + step:.1f}",
        ]  # fmt: skip
    # matplotlib leaves its texts in comments.
    for comment in ("<!-- gate 0.99 -->", "<!-- conditional -->", "<!-- 10 -->", "<!-- step -->"):
        assert comment in html


def markers(figure: str, color: str) -> NDArray[np.float64]:
    """Where a figure has the points of a series, [n, 2]; the last is that of the legend."""
    found = re.findall(rf'<use [^>]*x="([\d.]+)" y="([\d.]+)" style="fill: {color}', figure)
    return np.array(found, float)


@pytest.mark.parametrize("color", ["#3b82f6", "#f59e0b"])
def test_the_plots_show_the_figures(color: str) -> None:
    """The cosines halve their distance to 1, the ratios are linear: so both plots are lines."""
    made = comparison(steps=9)
    steps = tuple(replace(at, cosine=1 - 0.1 * 0.5**at.step) for at in made.runs[0].steps)
    html = render(replace(made, runs=(replace(made.runs[0], steps=steps),)))
    for figure, down in zip(re.findall(r"<svg.*?</svg>", html, re.S), (1, -1), strict=True):
        points = markers(figure, color)
        assert len(points) == 9 + 1
        differences = np.diff(points[:9], axis=0)
        assert np.allclose(differences, differences[0], atol=1e-3)
        assert differences[0, 0] > 0
        assert differences[0, 1] * down > 0


def test_it_needs_nothing_else_and_runs_nothing() -> None:
    html = render(replace(comparison(), layers={"blocks.0.ffn.0": 30.0}))
    page = Page(html)
    assert {"script", "link", "iframe", "object"}.isdisjoint(tag for tag, _ in page.elements)
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "action"):
                assert value is not None
                assert value.startswith(("data:image/", "#"))
    assert not re.search(r"url\((?!#)|@import", html)
    defined = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    used = re.findall(r'(?:xlink:href="|url\()#([\w-]+)', html)
    assert set(used) <= set(defined)


def test_it_follows_the_colours_of_the_screen() -> None:
    html = render(comparison())
    assert "prefers-color-scheme: dark" in html
    figures = re.findall(r"<svg.*?</svg>", html, re.S)
    assert len(figures) == 2
    for figure in figures:
        assert "currentColor" in figure
        assert "#000000" not in figure
        assert "#010203" not in figure


@pytest.mark.parametrize("place", ["prompt", "folder", "layer", "environment"])
def test_texts_of_others_are_escaped(place: str) -> None:
    made = comparison(prompt=EVIL if place == "prompt" else "a cat")
    if place == "folder":
        made = replace(made, candidate=replace(made.candidate, folder=EVIL))
    elif place == "layer":
        made = replace(made, layers={EVIL: 3.0})
    elif place == "environment":
        made = replace(made, environment={"cpu": EVIL})
    html = render(made)
    page = Page(html)
    assert "<script" not in html
    assert "script" not in {tag for tag, _ in page.elements}
    assert EVIL in page.text


def test_frames_and_their_differences() -> None:
    made = comparison()
    page = Page(render(made))
    found = made.runs[0].clip
    assert found is not None
    assert [still.index for still in found.stills][:2] == [0, 4]
    match = re.search(r"candidate − reference, ×(\d+)", page.text)
    assert match is not None
    factor = int(match[1])
    errors = [np.abs(s.candidate.astype(int) - s.reference) for s in found.stills]
    high = np.percentile(np.concatenate([error.ravel() for error in errors]), 99)
    assert high * factor <= 255 < high * factor * 2
    expected = []
    for still, error in zip(found.stills, errors, strict=True):
        floor = np.abs(still.ulp_baseline.astype(int) - still.reference)
        expected += [still.reference, still.candidate, error * factor, floor * factor]
    assert len(page.images) == len(expected)
    for image, array in zip(page.images, expected, strict=True):
        assert np.array_equal(image, np.minimum(array, 255))
    for error in errors:
        assert f"PSNR {10 * math.log10(255**2 / np.mean(error**2)):.2f} dB" in page.text


def test_large_frames_are_made_smaller() -> None:
    made = comparison(width=1001)
    image = Page(render(made)).images[0]
    assert image.shape == (10, 480, 3)
    reference = clip(1001, 2)[0]
    assert abs(image.mean() - reference.mean()) < 1


def test_a_candidate_that_fails() -> None:
    made = comparison(cosine=0.98)
    page = Page(render(made))
    assert "Not accurate enough: 2 problems." in page.text
    for problem in made.problems:
        assert problem in page.text
    bad = [attributes for _, attributes in page.elements if attributes.get("class") == "n bad"]
    assert len(bad) == 2 + 8


def test_what_is_not_finite_and_what_is_missing() -> None:
    made = comparison(cosine=math.nan)
    (run,) = made.runs
    broken = replace(run, clip=None, health=("candidate: NaN",), steps=(*run.steps[:3],))
    html = render(replace(made, runs=(run, broken)))
    page = Page(html)
    assert html.count("<!-- not finite -->") == 4  # two plots of two runs
    assert "not finite" in page.cells
    assert "nan" not in page.text.lower().replace("candidate: nan", "")
    assert len(page.images) == 4 * len(run.clip.stills)  # type: ignore[union-attr]


def test_exact_agreement_has_a_place_on_a_logarithmic_axis() -> None:
    html = render(comparison(cosine=1.0))
    assert "nan" not in re.sub('base64,[^"]*', "", html).lower().replace("dominant", "")


def test_one_step_one_branch() -> None:
    made = comparison(steps=1)
    run = replace(made.runs[0], steps=made.runs[0].steps[:1])
    assert "<!-- unconditional -->" not in render(replace(made, runs=(run,)))


def test_the_worst_layers() -> None:
    layers = {f"blocks.{i}.ffn.0": 60.0 - i for i in range(50)}
    html = render(replace(comparison(), layers=layers))
    assert "The worst 40 of 50 8-bit layers" in html
    assert "<!-- gate 24 dB -->" in html
    shown = [int(i) for i in re.findall(r"<!-- blocks\.(\d+)\.ffn\.0 -->", html)]
    assert shown == list(range(49, 9, -1))
    few = render(replace(comparison(), layers={"blocks.0.ffn.0": 30.0}))
    assert "The 1 8-bit layers" in few


def test_the_files(tmp_path: Path) -> None:
    made = comparison(prompt="ein Hund, 狗")
    for _ in range(2):
        data, page = write_accuracy(made, tmp_path / "new" / "report")
    assert sorted(path.name for path in data.parent.iterdir()) == ["accuracy.html", "accuracy.json"]
    document = json.loads(data.read_text(encoding="utf-8"))
    assert document == json.loads(json.dumps(made.to_json()))
    assert document["runs"][0]["options"]["prompt"] == "ein Hund, 狗"
    assert page.read_text(encoding="utf-8") == render(made)


def test_a_failure_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_accuracy(comparison(), tmp_path)
    before = [path.read_bytes() for path in paths]

    def fail(*_: Any) -> str:
        raise RuntimeError("bug")

    monkeypatch.setattr(report_module, "render", fail)
    with pytest.raises(RuntimeError):
        write_accuracy(comparison(prompt="another"), tmp_path)
    assert [path.read_bytes() for path in paths] == before
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be one"):
        prepare_folder(tmp_path / "file" / "report")


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_without_the_packages(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(html_module, "find_spec", lambda name: None if name == package else name)
    with pytest.raises(EnvironmentMismatchError, match=rf"{package}.*pip install 'wanx\[report\]'"):
        prepare_folder(tmp_path / "report")
    assert list(tmp_path.iterdir()) == []
