"""Runs in buffers that stay, as CUDA graphs need them; here on the processor, without a capture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.support.component_feeds import AXES, component_feeds
from wanx.builtin import open_named
from wanx.bundle.reader import Bundle
from wanx.errors import WanxError
from wanx.runtime.sessions.engine_session import MAX_CACHED_SHAPES, RUNS_BEFORE_CAPTURE
from wanx.runtime.sessions.onnxruntime import providers, session
from wanx.runtime.sessions.onnxruntime.captured_runs import (
    CAPTURE_ID,
    FixedBuffers,
    run_options,
)
from wanx.runtime.sessions.onnxruntime.providers import PROVIDERS, ProviderOptions
from wanx.runtime.sessions.onnxruntime.session import OnnxRuntimeSession

ONE = ProviderOptions(threads=1)
CONSTANTS = ("rope_cos", "rope_sin")


@pytest.fixture(scope="module")
def tiny() -> Bundle:
    return open_named("tiny")


@pytest.fixture
def capturing(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> Iterator[OnnxRuntimeSession]:
    """The processor's provider, taken for one that captures."""
    table = dict(PROVIDERS) | {"cpu": replace(PROVIDERS["cpu"], captures=True)}
    monkeypatch.setattr(session, "PROVIDERS", table)
    with OnnxRuntimeSession(tiny, "dit", options=ONE) as opened:
        yield opened


def draw(length: int, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and other inputs of the denoiser for so many tokens."""
    config = open_named("tiny").manifest.config
    feeds = component_feeds("dit", config, seed, AXES | {"L": length})
    return {name: feeds.pop(name) for name in CONSTANTS}, feeds


def ids(session: OnnxRuntimeSession) -> list[int]:
    assert session._captured is not None
    for buffers in session._captured._buffers.values():
        found = buffers._options.get_run_config_entry(CAPTURE_ID)
        assert found == str(buffers.capture_id)
    return session._captured.ids


def test_repeated_runs_are_those_of_a_plain_session(
    tiny: Bundle, capturing: OnnxRuntimeSession
) -> None:
    with OnnxRuntimeSession(tiny, "dit", options=ONE) as plain:
        plain._captured = None
        kept = []
        for seed in range(2 * RUNS_BEFORE_CAPTURE + 1):
            for length in (24, 7):
                constants, feeds = draw(length, seed)
                feeds = constants | feeds
                expected = plain.run(feeds)["velocity"]
                result = capturing.run(feeds)["velocity"]
                np.testing.assert_array_equal(result, expected)
                kept.append((result, expected))
        for result, expected in kept:  # no result lies in a buffer that a later run fills
            np.testing.assert_array_equal(result, expected)
    assert ids(capturing) == [1, 2]


@pytest.mark.parametrize("moved", [False, True])
def test_new_constants_are_read(
    moved: bool, tiny: Bundle, capturing: OnnxRuntimeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same size they are written to where the graphs read; else the graphs are made anew."""
    with OnnxRuntimeSession(tiny, "dit", options=ONE) as plain:
        plain._captured = None
        given = []
        for seed, length in enumerate((24, 7 if moved else 24)):
            constants, _ = draw(length, seed)
            given.append((constants["rope_cos"], constants["rope_cos"].copy()))
            plain.bind(constants)
            capturing.bind(constants)
            for number in range(RUNS_BEFORE_CAPTURE + 2):
                _, feeds = draw(length, 10 + number)
                np.testing.assert_array_equal(
                    capturing.run(feeds)["velocity"], plain.run(feeds)["velocity"]
                )
            assert ids(capturing) == [1 + seed if moved else 1]
        for array, before in given:
            np.testing.assert_array_equal(array, before)


def test_few_shapes_are_kept(capturing: OnnxRuntimeSession) -> None:
    released = []
    assert capturing._session is not None
    capturing._session.release_captured_graph = released.append  # type: ignore[method-assign]
    for length in range(4, 4 + MAX_CACHED_SHAPES + 2):
        constants, feeds = draw(length, 0)
        for _ in range(RUNS_BEFORE_CAPTURE + 1):
            assert capturing.run(constants | feeds)["velocity"].shape[1] == length
    assert ids(capturing) == [3, 4, 5, 6]
    assert released == [1, 2]


def test_a_capture_that_fails_is_gone_on_without(
    tiny: Bundle, capturing: OnnxRuntimeSession, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def fail(self: FixedBuffers, feeds: Any) -> None:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(FixedBuffers, "run", fail)
    constants, feeds = draw(24, 0)
    capturing.bind(constants)
    results = [capturing.run(feeds)["velocity"] for _ in range(RUNS_BEFORE_CAPTURE + 3)]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])
    (line,) = caplog.messages
    assert line == (
        "no CUDA graph is made of dit (operation not permitted when stream is capturing): every "
        "step launches its kernels"
    )
    assert capturing._captured is None


def test_other_runs_are_not_captured() -> None:
    assert run_options(None).get_run_config_entry(CAPTURE_ID) == "-1"
    assert providers.PROVIDERS["cuda"].settings(ProviderOptions(captures=True)) == {
        "arena_extend_strategy": "kSameAsRequested",
        "enable_cuda_graph": "1",
    }
    assert "enable_cuda_graph" not in providers.PROVIDERS["cuda"].settings(ProviderOptions())


@pytest.mark.parametrize(
    ("text", "goes_on"),
    [
        (
            "This session cannot use the graph capture feature as requested by the user as all "
            "compute graph nodes have not been partitioned to the CUDAExecutionProvider",
            True,
        ),
        ("something else", False),
    ],
)
def test_a_graph_that_cannot_be_captured_runs_without(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch, text: str, goes_on: bool
) -> None:
    table = dict(PROVIDERS) | {"cpu": replace(PROVIDERS["cpu"], captures=True)}
    monkeypatch.setattr(session, "PROVIDERS", table)
    create = session.create_session
    asked = []

    def creating(*arguments: Any, options: ProviderOptions, **keywords: Any) -> Any:
        asked.append(options.captures)
        if options.captures:
            raise RuntimeError(text)
        return create(*arguments, options=options, **keywords)

    monkeypatch.setattr(session, "create_session", creating)
    if not goes_on:
        with pytest.raises(WanxError, match="something else"):
            OnnxRuntimeSession(tiny, "dit", options=ONE)
        return
    with OnnxRuntimeSession(tiny, "dit", options=ONE) as opened:
        constants, feeds = draw(24, 0)
        for _ in range(RUNS_BEFORE_CAPTURE + 1):
            opened.run(constants | feeds)
        assert opened._captured is None
    assert asked == [True, False]


def test_components_that_run_once_are_not_captured(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = dict(PROVIDERS) | {"cpu": replace(PROVIDERS["cpu"], captures=True)}
    monkeypatch.setattr(session, "PROVIDERS", table)
    with OnnxRuntimeSession(tiny, "vae_decoder_up_rest", options=ONE) as opened:
        assert opened._captured is None
