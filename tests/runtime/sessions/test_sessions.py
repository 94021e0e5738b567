"""Sessions on ONNX Runtime: constants, carried state, and errors that a user can act on."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.components import Float32
from tests.support.peers import relative_error
from wanx.bundle.reader import Bundle
from wanx.errors import CorruptInputError, WanxError
from wanx.runtime.sessions import open_session
from wanx.runtime.sessions.base import State
from wanx.runtime.tokens import rope_tables

LATENT = (16, 4, 6, 10)


@pytest.fixture
def features(bundle_fp32: Bundle) -> Float32:
    """What the decoder's first half makes of a latent, as far as the second can tell."""
    vae = bundle_fp32.manifest.config.vae
    shape = (1, vae.base_dim * vae.multipliers[-1], *LATENT[1:])
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


@pytest.fixture
def dit_feeds() -> dict[str, Float32]:
    """Inputs of a transformer of 12 tokens."""
    generator = np.random.default_rng(0)
    cos, sin = rope_tables((1, 3, 4), (8, 8, 8))
    return {
        "tokens": generator.standard_normal((1, 12, 64), dtype=np.float32),
        "timestep": np.array([500], dtype=np.float32),
        "context": generator.standard_normal((1, 512, 40), dtype=np.float32),
        "rope_cos": cos,
        "rope_sin": sin,
    }


def test_state_outlives_its_session(features: Float32, bundle_fp32: Bundle) -> None:
    """It is all that the next frames need; a run leaves what it was given alone."""
    state: State = {}
    with open_session(bundle_fp32, "vae_decoder_up_first", threads=1) as session:
        outputs = session.run({"features": features[:, :, :1]}, state)
    assert outputs.keys() == {"video"}
    component = bundle_fp32.manifest.components["vae_decoder_up_rest"]
    assert {"features", *state} == set(component.inputs)
    with open_session(bundle_fp32, "vae_decoder_up_rest", threads=1) as session:
        for index in range(1, LATENT[1]):
            chunk = np.ascontiguousarray(features[:, :, index : index + 1])
            before = dict(state)
            outputs = session.run({"features": chunk}, state)
            assert outputs.keys() == {"video"}
            assert state.keys() == before.keys()
            assert all(state[name] is not before[name] for name in state)


def test_a_stream_can_fork(features: Float32, bundle_fp32: Bundle) -> None:
    """A run reads the state that it is given and leaves copies of it alone."""
    chunks = [np.ascontiguousarray(features[:, :, i : i + 1]) for i in range(3)]
    state: State = {}
    with open_session(bundle_fp32, "vae_decoder_up_first", threads=1) as session:
        session.run({"features": chunks[0]}, state)
    fork = dict(state)
    with open_session(bundle_fp32, "vae_decoder_up_rest", threads=1) as session:
        one = session.run({"features": chunks[1]}, state)["video"]
        other = session.run({"features": chunks[2]}, fork)["video"]
        again: State = dict(state)
        after_one = session.run({"features": chunks[2]}, again)["video"]
    assert relative_error(one, other) > 1e-2
    assert relative_error(other, after_one) > 1e-3


def test_without_state_all_outputs_are_returned(features: Float32, bundle_fp32: Bundle) -> None:
    with open_session(bundle_fp32, "vae_decoder_up_first", threads=1) as session:
        outputs = session.run({"features": features[:, :, :1]})
    assert set(outputs) == set(bundle_fp32.manifest.components["vae_decoder_up_first"].outputs)
    assert all(isinstance(value, np.ndarray) for value in outputs.values())


def test_bound_inputs_stay_from_run_to_run(
    dit_feeds: dict[str, Float32], bundle_fp32: Bundle
) -> None:
    names = ("rope_cos", "rope_sin")
    rest = {name: value for name, value in dit_feeds.items() if name not in names}
    with open_session(bundle_fp32, "dit", threads=1) as session:
        expected = session.run(dit_feeds)["velocity"]
        session.bind({"rope_cos": dit_feeds["rope_cos"]})
        session.bind({"rope_sin": dit_feeds["rope_sin"]})
        for _ in range(2):
            assert np.array_equal(session.run(rest)["velocity"], expected)
        turned = session.run(rest | {"rope_sin": -dit_feeds["rope_sin"]})["velocity"]
        assert relative_error(turned, expected) > 1e-3
        session.bind({"rope_sin": -dit_feeds["rope_sin"]})
        assert np.array_equal(session.run(rest)["velocity"], turned)


def test_inputs_need_not_be_contiguous(dit_feeds: dict[str, Float32], bundle_fp32: Bundle) -> None:
    strided = dict(dit_feeds)
    for name in ("tokens", "context"):
        strided[name] = np.asfortranarray(dit_feeds[name])
        assert not strided[name].flags.c_contiguous
    constants = {name: np.asfortranarray(strided.pop(name)) for name in ("rope_cos", "rope_sin")}
    with open_session(bundle_fp32, "dit", threads=1) as session:
        expected = session.run(dit_feeds)["velocity"]
        session.bind(constants)
        assert np.array_equal(session.run(strided)["velocity"], expected)


def test_results_are_the_callers(dit_feeds: dict[str, Float32], bundle_fp32: Bundle) -> None:
    """A result neither changes in the next run nor vanishes with its session."""
    with open_session(bundle_fp32, "dit", threads=1) as session:
        first = session.run(dit_feeds)["velocity"]
        kept = first.copy()
        session.run(dit_feeds | {"tokens": dit_feeds["tokens"] * 2})
    assert np.array_equal(first, kept)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_portable_graph_equals_the_specialised_one(
    precision: str, dit_feeds: dict[str, Float32], bundles: Callable[[str], Bundle]
) -> None:
    bundle = bundles(precision)
    component = bundle.manifest.components["dit"]
    assert component.engines
    portable = component.model_copy(update={"engines": {}})
    components = bundle.manifest.components | {"dit": portable}
    manifest = bundle.manifest.model_copy(update={"components": components})
    outputs = []
    for variant in (bundle, dataclasses.replace(bundle, manifest=manifest)):
        with open_session(variant, "dit", threads=1) as session:
            outputs.append(session.run(dit_feeds)["velocity"])
    assert relative_error(*outputs) <= 1e-5


@pytest.fixture
def damaged(bundle_fp32: Bundle, tmp_path: Path) -> Bundle:
    """A copy to damage, opened before the damage as if it happened while in use."""
    root = shutil.copytree(bundle_fp32.root, tmp_path / "bundle")
    return dataclasses.replace(bundle_fp32, root=root, directory=None)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [Path.unlink, cut, lambda path: path.write_bytes(b"?" * 99)])
def test_a_damaged_graph(
    damage: Callable[[Path], Any], damaged: Bundle, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(damaged.root / damaged.manifest.components["dit"].engines["cpu"])
    assert_one_line(lambda: open_session(damaged, "dit", threads=1), CorruptInputError, "dit")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("damage", [Path.unlink, cut])
def test_damaged_weights(
    damage: Callable[[Path], Any], damaged: Bundle, capfd: pytest.CaptureFixture[str]
) -> None:
    for path in damaged.manifest.components["text_encoder"].weights:
        damage(damaged.root / path)
    assert_one_line(
        lambda: open_session(damaged, "text_encoder", threads=1), CorruptInputError, "text_encoder"
    )
    assert capfd.readouterr() == ("", "")


def test_inputs_that_do_not_fit(
    dit_feeds: dict[str, Float32], bundle_fp32: Bundle, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong: list[dict[str, Any]] = [
        dit_feeds | {"tokens": dit_feeds["tokens"][..., :63].copy()},
        dit_feeds | {"timestep": dit_feeds["timestep"].astype(np.float64)},
        dit_feeds | {"surprise": dit_feeds["timestep"]},
        {name: value for name, value in dit_feeds.items() if name != "context"},
        dit_feeds | {"rope_cos": dit_feeds["rope_cos"][:-1]},
    ]
    with open_session(bundle_fp32, "dit", threads=1) as session:
        expected = session.run(dit_feeds)["velocity"]
        for feeds in wrong:
            assert_one_line(lambda feeds=feeds: session.run(feeds), CorruptInputError, "dit")
        assert capfd.readouterr() == ("", "")
        # A refused run does no harm to the next one.
        assert np.array_equal(session.run(dit_feeds)["velocity"], expected)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION :\n std::bad_alloc"),
        RuntimeError("Failed to allocate memory for requested buffer of size 51539607552"),
    ],
)
def test_too_little_memory(
    error: Exception,
    dit_feeds: dict[str, Float32],
    bundle_fp32: Bundle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import onnxruntime

    def fail(*_: object, **__: object) -> None:
        raise error

    with open_session(bundle_fp32, "dit", threads=1) as session:
        monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_ort_values", fail)
        message = assert_one_line(lambda: session.run(dit_feeds), WanxError, "dit")
    assert "not enough memory" in message
    assert "fewer frames" in message


def assert_one_line(act: Callable[[], object], kind: type[WanxError], name: str) -> str:
    with pytest.raises(WanxError) as caught:
        act()
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message
    assert name in message
    return message
