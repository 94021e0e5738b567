"""Every component on OpenVINO, against ONNX Runtime's own kernels for the processor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.component_feeds import component_feeds
from tests.support.peers import relative_error
from tools.synthesize import synthesize
from wanx.accuracy.golden_check import check_golden
from wanx.bundle.reader import Bundle, open_bundle
from wanx.config.models import PRESETS
from wanx.exporter.calibration.options import CalibrationOptions
from wanx.exporter.export import export
from wanx.exporter.options import ExportOptions
from wanx.exporter.quantization.scheme import QuantizeOptions
from wanx.runtime.sessions import open_session

NO_GOLDEN = CalibrationOptions(golden_steps=0)
QUICK = CalibrationOptions(prompts=1, steps=2, golden_steps=2, width=32, height=32, frames=5)
Bundles = Callable[[str], Bundle]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """Bundles for OpenVINO, by what they are; made when they are asked for."""
    base = tmp_path_factory.mktemp("openvino")
    made: dict[str, Bundle] = {}

    def make(kind: str) -> Bundle:
        source: str | Path = "tiny-i2v"
        precision, calibration, options = "auto", NO_GOLDEN, QuantizeOptions()
        if kind == "int8":
            precision, calibration = "int8", QUICK
        elif kind == "wide int8":
            source, precision = find("wide").root, "int8"
            options = QuantizeOptions(components=("text_encoder",))
        elif kind == "wide":
            source = base / "source"
            # The VAE of the real models, and the other networks a few times as wide as tiny ones.
            config = PRESETS["tiny-i2v"]
            dit = replace(
                config.dit, dim=768, ffn_dim=1536, num_heads=6, num_layers=2, text_dim=512
            )
            text = replace(
                config.text_encoder, dim=512, ffn_dim=1024, num_heads=8, head_dim=64, num_layers=2
            )
            wide = replace(config, dit=dit, text_encoder=text, vae=PRESETS["t2v-14B"].vae)
            synthesize(wide, source)
        return export(
            ExportOptions(
                source=source, output=base / kind.replace(" ", "-"), precision=precision,
                target="openvino", calibration=calibration, quantize=options,
            )
        )  # fmt: skip

    def find(kind: str) -> Bundle:
        if kind not in made:
            made[kind] = make(kind)
        return made[kind]

    return find


COMPONENTS = [
    *("text_encoder", "image_encoder", "dit"),
    *(f"vae_encoder_{part}" for part in ("down_first", "down_rest", "mid_first", "mid_rest")),
    *(f"vae_decoder_{part}" for part in ("mid_first", "mid_rest", "up_first", "up_rest")),
]


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("kind", ["tiny", "wide"])
def test_it_computes_the_same(
    kind: str, component: str, bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32, all of it on OpenVINO: no node is left."""
    monkeypatch.setenv("WANX_STRICT", "1")
    bundle = bundles(kind)
    feeds = component_feeds(component, bundle.manifest.config)
    with open_session(bundle, component, provider="cpu", threads=1) as session:
        expected = session.run(feeds)
    with open_session(bundle, component, threads=1) as session:
        actual = session.run(feeds)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert np.isfinite(value).all()
        if value.any():
            assert relative_error(actual[name], value) <= 2e-5, name
        else:  # the past of a layer before the first frame
            assert not actual[name].any()


@pytest.mark.parametrize(
    ("kind", "like", "component"),
    [
        ("int8", "tiny", "text_encoder"),
        ("int8", "tiny", "dit"),
        ("wide int8", "wide", "text_encoder"),
    ],
)
def test_in_8_bits(
    kind: str, like: str, component: str, bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As close to the unquantised network as the processor's own kernels are."""
    monkeypatch.setenv("WANX_STRICT", "1")
    bundle = bundles(kind)
    feeds = component_feeds(component, bundle.manifest.config)
    with open_session(bundles(like), component, provider="cpu", threads=1) as session:
        exact = session.run(feeds)
    errors = {}
    for provider in ("cpu", "openvino"):
        with open_session(bundle, component, provider=provider, threads=1) as session:
            (name, value), *_ = session.run(feeds).items()
            errors[provider] = relative_error(value, exact[name])
    assert errors["openvino"] <= 1.2 * errors["cpu"] + 1e-4


def test_golden_steps_in_8_bits(bundles: Bundles) -> None:
    for agreement in check_golden(bundles("int8"), threads=1):
        assert agreement.cosine >= 0.99


def test_it_is_what_the_bundle_says(bundles: Bundles, tmp_path: Path) -> None:
    bundle = bundles("tiny")
    assert bundle.manifest.target == "openvino"
    engines = {component.engines["openvino"] for component in bundle.manifest.components.values()}
    assert len(engines) == len(COMPONENTS)
    assert all(engine in bundle.manifest.files for engine in engines)
    assert open_bundle(bundle.root, verify="full").hash == bundle.hash
