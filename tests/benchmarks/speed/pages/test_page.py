"""The page of a benchmark: what it says, that it is safe, and that a browser shows all of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tests.support.speed_results import CASE, results, trial
from wanx.benchmarks.peers.agreement import PeerAgreement
from wanx.benchmarks.speed.pages.markdown import to_markdown
from wanx.benchmarks.speed.pages.page import Still, count, render, size
from wanx.benchmarks.speed.results import Results
from wanx.benchmarks.speed.roofline.bounds import roofline
from wanx.benchmarks.speed.roofline.ceilings import Ceilings
from wanx.benchmarks.speed.roofline.cost import PartCost
from wanx.benchmarks.speed.roofline.profile import Operation, Profile
from wanx.benchmarks.speed.sweep import Fit, Point, Prediction, Sweep

EVIL = '<script>alert("1")</script> --> & {{ 7 * 7 }} $x_{$ | pipe'
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def everything(label: str = "new") -> Results:
    """Results with all that a page can show."""
    operation = Operation(name="MatMul", part="linears", shapes="1×24×128", calls=6, share=0.4)
    limits = Ceilings(flops={"high": 2e11, "int8": 8e11}, high="fp32", bytes=3e10)
    costs = [
        PartCost(part="linears", flops={"int8": 4e9, "high": 1e9}, bytes=1e8),
        PartCost(part="self-attention", flops={"high": 9e9}, bytes=2e7),
    ]
    shares = {"linears": 0.4, "self-attention": 0.55, "norms": 0.05}
    found = roofline(
        costs, limits, Profile(parts=shares, operations=(operation,)), runs=2, seconds=1.0,
        with_operations=True, subject=1, case=0, component="dit", unit="denoising step",
    )  # fmt: skip
    points = tuple(Point(label=f"{n}", tokens=n, seconds=(n / 100,)) for n in (12, 24, 36))
    sweep = Sweep(
        subject=0, branches=2, points=points, fit=Fit(linear=0.01, quadratic=1e-5),
        predictions=(Prediction(label="832x480, 81 frames", tokens=32_760, seconds=11_060.0),),
    )  # fmt: skip
    agreement = PeerAgreement(
        subject=1, case=0, first_step_cosine=0.99991, latent_cosine=0.97, psnr_db_min=31.4
    )
    trials = [
        trial(subject, number, [0.4, 0.2 + subject / 10, 0.2 + number / 50], case=case)
        for number in range(2)
        for case in range(2)
        for subject in range(2)
    ]
    return results(
        *trials, labels=("old", label), cases=(CASE, replace(CASE, width=128)),
        rooflines=(found,), sweep=(sweep,), agreements=(agreement,), problems=(label,),
    )  # fmt: skip


class Page(HTMLParser):
    """Text and tags of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def stills() -> dict[tuple[int, int], tuple[Still, ...]]:
    pixels = np.zeros((48, 64, 3), np.uint8)
    return {
        (s, 0): (Still(number=1, pixels=pixels), Still(number=5, pixels=pixels)) for s in (0, 1)
    }


def test_a_page_says_everything() -> None:
    page = Page(render(everything(), stills()))
    for text in (
        "Speed of old, new", "64×48, 5 frames", "128×48, 5 frames", "of the ceiling",
        "0.999910", "MatMul", "32,760", "Incomplete: 1 problem", "times old", "wanx bench one",
        "From starting the process to the finished file",
    ):  # fmt: skip
        assert text in page.text, text
    assert sum(tag == "img" for tag, _ in page.tags) == 4
    assert sum(tag == "svg" for tag, _ in page.tags) == 2 * 3 + 2


def test_a_page_needs_nothing_else_and_runs_nothing() -> None:
    page = Page(render(everything(EVIL), stills()))
    assert {"script", "link", "iframe", "object"}.isdisjoint(tag for tag, _ in page.tags)
    assert EVIL in page.text
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:"))
    # A glyph has one name in all plots and one shape; nothing else shares a name.
    defined = [str(attributes["id"]) for _, attributes in page.tags if "id" in attributes]
    others = [name for name in defined if not name.startswith("DejaVu")]
    assert len(others) == len(set(others))


def test_without_trials_there_is_still_a_page() -> None:
    page = Page(render(results(problems=("interrupted after 0 trials",))))
    assert "interrupted after 0 trials" in page.text


def test_markdown_can_be_pasted() -> None:
    text = to_markdown(everything(EVIL))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    columns = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
    assert columns == {5}  # name, old, new, ratio
    assert any(row.startswith("| step | 200 ms (200 ms to 214 ms)") for row in rows)
    assert "\n    wanx bench one\n" in text


@pytest.mark.parametrize(
    ("value", "text"), [(1.5e9, "1.5 GB"), (999, "999 B"), (12_345, "12.3 kB"), (2e6, "2 MB")]
)
def test_sizes(value: float, text: str) -> None:
    assert size(value) == text


def test_counts() -> None:
    assert [count(v, "FLOP") for v in (3.36e15, 2.1e11, 5.0, 0.0)] == [
        "3.36 PFLOP", "210 GFLOP", "5 FLOP", "–",
    ]  # fmt: skip


PROBE = """
<body><iframe id="page" src="report.html" style="border:0;width:{width}px;height:900px"></iframe>
<script>
document.getElementById("page").onload = (event) => {{
  const page = event.target.contentDocument, root = page.documentElement;
  const images = [...page.images].every((image) => image.complete && image.naturalWidth > 0);
  const plots = [...page.querySelectorAll("svg")].every((plot) => {{
    const box = plot.getBoundingClientRect();
    return box.width > 200 && box.height > 40;
  }});
  document.title = JSON.stringify({{over: root.scrollWidth - root.clientWidth, images, plots}});
}};
</script>
"""


@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_all_of_it(tmp_path: Path, width: int) -> None:
    """Nothing is wider than the screen, and every image and plot is there."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    (tmp_path / "report.html").write_text(render(everything(), stills()))
    (tmp_path / "probe.html").write_text(PROBE.format(width=width))
    shown = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--allow-file-access-from-files",
            f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom",
            (tmp_path / "probe.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=600, check=True,
    ).stdout  # fmt: skip
    assert '<title>{"over":0,"images":true,"plots":true}</title>' in shown
