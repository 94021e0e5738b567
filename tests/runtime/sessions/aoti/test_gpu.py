"""Compiled programs on a GPU against ONNX Runtime on the processor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import wanx
from wanx.bundle.reader import Bundle
from wanx.exporter.calibration.options import CalibrationOptions
from wanx.exporter.quantization.scheme import QuantizeOptions
from wanx.runtime.sessions import open_session
from wanx.runtime.tokens import rope_tables

pytestmark = pytest.mark.gpu
GRID = (5, 4, 4)


def answers(bundle: Bundle, runs: int) -> list[np.ndarray]:
    """Velocities of as many runs, whose inputs differ."""
    dit = bundle.manifest.config.dit
    cos, sin = rope_tables(GRID, dit.rope_dims)
    found = []
    with open_session(bundle, "dit") as session:
        session.bind({"rope_cos": cos, "rope_sin": sin})
        for seed in range(runs):
            generator = np.random.default_rng(seed)
            shapes = {"tokens": (1, 80, dit.token_dim), "context": (1, dit.text_len, dit.text_dim)}
            feeds: dict[str, Any] = {
                name: generator.standard_normal(shape, dtype=np.float32)
                for name, shape in shapes.items()
            }
            feeds["timestep"] = np.array([generator.uniform(1, 999)], np.float32)
            found.append(session.run(feeds)["velocity"])
    return found


@pytest.mark.parametrize(
    ("precision", "quantize"),
    [
        ("bf16", QuantizeOptions()),
        ("int8", QuantizeOptions()),
        ("fp8", QuantizeOptions()),
        ("fp8", QuantizeOptions(activation_scale="dynamic")),
        ("fp8", QuantizeOptions(weight_scale="tensor", attention="fp8")),
    ],
)
def test_a_bundle(
    precision: str,
    quantize: QuantizeOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    """It passes its golden steps, and recorded runs (from the third on) answer like the others."""
    monkeypatch.setenv("WANX_STRICT", "1")
    bundle = wanx.export(
        "tiny", tmp_path / "b", precision=precision, target="aoti", gate=True, quantize=quantize,
        calibration=CalibrationOptions(prompts=1, steps=3, golden_steps=2),
    )  # fmt: skip
    recorded = answers(bundle, 6)
    monkeypatch.setenv("WANX_CUDA_GRAPHS", "0")
    one_by_one = answers(bundle, 6)
    manifest = bundle.manifest.model_copy(update={"target": "cpu"})
    on_cpu = answers(dataclasses.replace(bundle, manifest=manifest), 6)
    cosines = []
    for captured, launched, wanted in zip(recorded, one_by_one, on_cpu, strict=True):
        np.testing.assert_array_equal(captured, launched)
        norms = np.linalg.norm(captured) * np.linalg.norm(wanted)
        cosines.append(float(np.vdot(captured, wanted) / norms))
    record_property("lowest cosine", f"{min(cosines):.5f}")
    assert min(cosines) >= 0.99
