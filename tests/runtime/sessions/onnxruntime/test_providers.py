"""Execution providers: what is refused, what is said, and going on without one."""

from __future__ import annotations

import shutil
import sys
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests.support.component_feeds import component_feeds
from wanx.builtin import open_named
from wanx.bundle.reader import Bundle
from wanx.config.models import PRESETS
from wanx.errors import EnvironmentMismatchError, UsageError, WanxError
from wanx.exporter.component_groups import component_groups
from wanx.runtime.pipeline import Pipeline
from wanx.runtime.sessions import open_session
from wanx.runtime.sessions.onnxruntime import loading, providers, session
from wanx.runtime.sessions.onnxruntime.providers import PROVIDERS, ProviderOptions
from wanx.runtime.sessions.registry import backend_of, require_budget


@pytest.fixture(scope="module")
def tiny() -> Bundle:
    return open_named("tiny")


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, providers.Provider]]:
    """The table of providers, which a test may change."""
    table = dict(PROVIDERS)
    monkeypatch.setattr(providers, "PROVIDERS", table)
    monkeypatch.setattr(session, "PROVIDERS", table)
    registered = providers._register
    registered.cache_clear()
    yield table
    registered.cache_clear()


def feeds(component: str = "text_encoder") -> dict[str, Any]:
    return component_feeds(component, open_named("tiny").manifest.config)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("opnvino", "openvino"),
        ("CUDA", "cuda"),
        ("tensorrt", "tensorrt-rtx"),
        ("web", "webgpu"),
    ],
)
def test_a_wrong_name(name: str, hint: str, tiny: Bundle) -> None:
    with pytest.raises(UsageError, match=f"--provider {name} is not .*did you mean {hint}[?]"):
        Pipeline(tiny, provider=name)
    with pytest.raises(UsageError, match="choose auto, cpu, cuda, openvino, tensorrt-rtx, webgpu"):
        open_session(tiny, "dit", provider="xyzzy")


@pytest.mark.parametrize(
    ("name", "package", "install"),
    [
        ("openvino", "onnxruntime-ep-openvino", "pip install 'wanx[openvino]'"),
        ("webgpu", "onnxruntime-ep-webgpu", "pip install 'wanx[webgpu]'"),
        ("tensorrt-rtx", "onnxruntime-ep-nv-tensorrt-rtx-cu13", "pip install 'wanx[tensorrt-rtx]'"),
    ],
)
def test_a_package_that_is_not_installed(
    name: str, package: str, install: str, tiny: Bundle, rows: dict[str, providers.Provider]
) -> None:
    rows[name] = replace(rows[name], plugin="no_such_module")
    for act in (Pipeline, lambda bundle, provider: open_session(bundle, "dit", provider=provider)):
        with pytest.raises(EnvironmentMismatchError) as caught:
            act(tiny, provider=name)  # type: ignore[operator]
        assert str(caught.value) == (
            f"{name} takes {package}, which is not installed: {install} (docs/install.md)"
        )


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="it is installed"
)
def test_the_other_package_of_onnxruntime(tiny: Bundle) -> None:
    with pytest.raises(EnvironmentMismatchError, match="takes onnxruntime-gpu in the place of onn"):
        Pipeline(tiny, provider="cuda")


def plugin(path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    module = types.ModuleType("a_plug_in")
    module.get_library_path = lambda: str(path)  # type: ignore[attr-defined]
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "a_plug_in", module)
    return "a_plug_in"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot open shared object file: No such file or directory"),
        (b"no library", "file too short"),
        ("another library", "undefined symbol: CreateEpFactories"),
    ],
)
def test_a_library_that_does_not_load(
    content: bytes | str | None, reason: str, tiny: Bundle, tmp_path: Path,
    rows: dict[str, providers.Provider], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    library = tmp_path / "library.so"
    if isinstance(content, bytes):
        library.write_bytes(content)
    elif content:
        shutil.copy(sys.modules["_ctypes"].__file__ or "", library)
    rows["openvino"] = replace(
        rows["openvino"],
        plugin=plugin(library, monkeypatch),
        execution_provider=f"Other{tmp_path.name}",
    )
    with pytest.raises(EnvironmentMismatchError) as caught:
        open_session(tiny, "text_encoder", provider="openvino")
    line = str(caught.value)
    assert line.startswith("openvino cannot load its library: ")
    assert reason in line
    assert line.endswith("see docs/install.md")


def test_no_device(tiny: Bundle, rows: dict[str, providers.Provider]) -> None:
    rows["openvino"] = replace(rows["openvino"], hardware=("NPU",))
    with pytest.raises(EnvironmentMismatchError, match="openvino finds no NPU that it"):
        open_session(tiny, "text_encoder", provider="openvino")


def test_a_provider_that_onnxruntime_drops(
    tiny: Bundle, rows: dict[str, providers.Provider]
) -> None:
    """As where the libraries of CUDA are missing: the session would run on the processor."""
    rows["cuda"] = replace(rows["cpu"], execution_provider="CUDAExecutionProvider")
    with pytest.raises(EnvironmentMismatchError, match="could not start cuda for text_encoder"):
        session.OnnxRuntimeSession(tiny, "text_encoder", provider="cuda")


def test_nodes_that_are_left(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "wanx.runtime")
    with open_session(tiny, "dit", provider="openvino", threads=1):
        pass
    (line,) = caplog.messages
    assert "openvino leaves 36 of " in line
    assert "nodes of dit on the processor: 24 RMSNormalization, 12 RotaryEmbedding; `wanx " in line
    assert line.endswith("makes a graph that it takes whole")
    monkeypatch.setenv("WANX_STRICT", "1")
    with pytest.raises(WanxError, match=r"openvino leaves 36 of .*a graph that it takes"):
        open_session(tiny, "dit", provider="openvino")


def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if OpenVINO had been measured to encode the texts of tiny models faster."""
    monkeypatch.setattr(providers, "FASTER", {"text_encoder": "openvino"})
    monkeypatch.setattr(providers, "_LEAST_WIDTH", 1)
    monkeypatch.setattr(providers, "_is_intel", lambda: True)


@pytest.mark.parametrize("intel", [True, False])
@pytest.mark.parametrize("preset", ["tiny", "t2v-1.3B", "i2v-14B"])
def test_where_another_provider_was_measured_to_be_faster(
    intel: bool, preset: str, rows: dict[str, providers.Provider], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what was measured: the VAE at its official width, on processors of one maker."""
    monkeypatch.setattr(providers, "_is_intel", lambda: intel)
    config = PRESETS[preset]
    found = {name: providers.fastest_provider(name, config) for name in component_groups(config)}
    wins = intel and preset != "tiny"
    for name, provider in found.items():
        assert provider == ("openvino" if wins and name.startswith("vae_") else "cpu")
    rows["openvino"] = replace(rows["openvino"], plugin="no_such_module")
    assert providers.fastest_provider("vae_decoder_up_rest", config) == "cpu"


def test_auto_takes_what_is_faster_and_installed(
    tiny: Bundle, rows: dict[str, providers.Provider], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level("INFO", "wanx.runtime")
    faster(monkeypatch)
    with open_session(tiny, "text_encoder", threads=1) as opened:
        assert isinstance(opened, session.OnnxRuntimeSession)
        assert opened.provider == "openvino"
    assert "text_encoder runs on openvino, where it was measured to be faster" in caplog.messages
    with open_session(tiny, "dit", provider="auto", threads=1) as opened:
        assert isinstance(opened, session.OnnxRuntimeSession)
        assert opened.provider == "cpu"
    rows["openvino"] = replace(rows["openvino"], plugin="no_such_module")
    with open_session(tiny, "text_encoder", threads=1) as opened:
        assert isinstance(opened, session.OnnxRuntimeSession)
        assert opened.provider == "cpu"


def test_a_faster_provider_that_fails_is_none_to_fail_for(
    tiny: Bundle, rows: dict[str, providers.Provider], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    faster(monkeypatch)
    rows["openvino"] = replace(rows["openvino"], hardware=("NPU",))
    with open_session(tiny, "text_encoder", threads=1) as opened:
        assert isinstance(opened, session.OnnxRuntimeSession)
        assert opened.provider == "cpu"
    assert caplog.messages[-1].startswith("openvino failed for text_encoder, which goes on")


def test_it_goes_on_without_a_package(
    tiny: Bundle, rows: dict[str, providers.Provider], caplog: pytest.LogCaptureFixture
) -> None:
    rows["openvino"] = replace(rows["openvino"], plugin="no_such_module")
    pipeline = Pipeline(tiny, provider="openvino", fallback=True, threads=1)
    with open_session(tiny, "text_encoder", provider=pipeline.provider, fallback=True) as opened:
        assert isinstance(opened, session.OnnxRuntimeSession)
        assert opened.provider == "cpu"
    (line,) = caplog.messages
    assert line.startswith("text_encoder goes on on the processor: openvino takes onnxruntime-ep-")


def test_it_goes_on_if_asked(
    tiny: Bundle, rows: dict[str, providers.Provider], caplog: pytest.LogCaptureFixture
) -> None:
    rows["openvino"] = replace(rows["openvino"], hardware=("NPU",))
    with open_session(tiny, "text_encoder", provider="cpu", threads=1) as opened:
        expected = opened.run(feeds())
    with open_session(
        tiny, "text_encoder", provider="openvino", fallback=True, threads=1
    ) as opened:
        assert np.array_equal(opened.run(feeds())["features"], expected["features"])
    (line,) = caplog.messages
    assert line.startswith(
        "openvino failed for text_encoder, which goes on on the processor: openvino finds"
    )


@pytest.mark.parametrize("fallback", [True, False])
def test_a_failure_while_it_runs(
    fallback: bool, tiny: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    """The state of a video goes on too; the second frame fails."""
    sizes = feeds("vae_decoder_up_rest")
    features = sizes.pop("features")

    def decode(opened: session.OnnxRuntimeSession, *, fails: bool) -> list[Any]:
        copies = {name: value.copy() for name, value in sizes.items()}  # state is overwritten
        state = {n: onnxruntime.OrtValue.ortvalue_from_numpy(v) for n, v in copies.items()}
        videos = []
        for number in range(3):
            if fails and number == 1:
                inner = opened._session
                opened._session = Failing(inner)  # type: ignore[assignment]
            videos.append(opened.run({"features": features}, state)["video"])
        return videos

    def load(**options: Any) -> session.OnnxRuntimeSession:
        options["options"] = ProviderOptions(threads=1)
        return session.OnnxRuntimeSession(tiny, "vae_decoder_up_rest", **options)

    expected = decode(load(), fails=False)
    broken = load(provider="openvino", fallback=fallback)
    if not fallback:
        with pytest.raises(WanxError, match="cannot run vae_decoder_up_rest: it broke; --fa"):
            decode(broken, fails=True)
        return
    for actual, video in zip(decode(broken, fails=True), expected, strict=True):
        np.testing.assert_allclose(actual, video, atol=1e-4)
    assert broken.provider == "cpu"
    assert sum("goes on on the processor" in line for line in caplog.messages) == 1


class Failing:
    """A session whose runs fail."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def run_with_ort_values(self, *_: Any) -> None:
        raise RuntimeError("it broke")


def test_constants_survive_going_on(tiny: Bundle) -> None:
    inputs = feeds("dit")
    constants = {name: inputs.pop(name) for name in ("rope_cos", "rope_sin")}
    options = ProviderOptions(threads=1)
    expected = session.OnnxRuntimeSession(tiny, "dit", options=options)
    expected.bind(constants)
    broken = session.OnnxRuntimeSession(
        tiny, "dit", provider="openvino", fallback=True, options=options
    )
    broken.bind(constants)
    broken._session = Failing(broken._session)  # type: ignore[assignment]
    assert np.array_equal(broken.run(inputs)["velocity"], expected.run(inputs)["velocity"])


def test_bound_outputs_are_the_same(tiny: Bundle) -> None:
    """As on devices, where the state stays; here on the processor's own memory."""
    opened = session.OnnxRuntimeSession(
        tiny, "vae_decoder_up_rest", options=ProviderOptions(threads=1)
    )
    inputs = feeds("vae_decoder_up_rest")
    features = {"features": inputs.pop("features")}
    values = {n: onnxruntime.OrtValue.ortvalue_from_numpy(v) for n, v in inputs.items()}
    names = [value.name for value in opened._session.get_outputs()]  # type: ignore[union-attr]
    bound = opened._run_bound(values, features, [n for n in names if n.endswith("_next")])
    state = dict(values)
    video = opened.run(features, state)["video"]
    assert np.array_equal(bound[0].numpy(), video)
    for name, value in zip(names[1:], bound[1:], strict=True):
        assert np.array_equal(value.numpy(), state[name.removesuffix("_next")].numpy())


def test_a_folder_of_onnxruntime_without_files(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of two packages leaves it that are uninstalled: an empty namespace."""
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    monkeypatch.setattr(loading, "installed_packages", list)
    for name in ("auto", "cpu", "cuda"):
        with pytest.raises(EnvironmentMismatchError, match="reinstall wanx"):
            open_session(tiny, "text_encoder", provider=name)


def test_a_budget_of_memory(tiny: Bundle) -> None:
    for name, other in (("auto", "cpu"), ("cpu", "cpu"), ("openvino", "openvino")):
        with pytest.raises(
            UsageError, match=f"is for GPUs, and the provider {other} runs on the processor"
        ):
            Pipeline(tiny, provider=name, vram_budget=1 << 30)
    for name in ("tensorrt-rtx", "webgpu"):
        with pytest.raises(UsageError, match=f"provider cuda, and not for {name}: leave it out"):
            require_budget("cuda", name)
    assert backend_of("cuda").warm_up_runs == backend_of("rtx").warm_up_runs  # both capture
    assert backend_of("cpu").warm_up_runs == backend_of("cuda", "openvino").warm_up_runs == 1
    for target in ("cuda", "rtx"):
        require_budget(target)
        require_budget(target, "cuda")
    settings = PROVIDERS["cuda"].settings(ProviderOptions(vram_budget=1 << 30))
    assert settings["gpu_mem_limit"] == str(1 << 30)


def test_several_threads_register_it_once(tiny: Bundle) -> None:
    def act(_: int) -> str:
        with open_session(tiny, "text_encoder", provider="openvino", threads=1) as opened:
            assert isinstance(opened, session.OnnxRuntimeSession)
            opened.run(feeds())
            return opened.provider

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(act, range(8))) == ["openvino"] * 8


@pytest.mark.parametrize(
    ("component", "order"), [("dit", "DEFAULT"), ("vae_decoder_up_rest", "PRIORITY_BASED")]
)
def test_order_of_nodes(
    component: str, order: str, tiny: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a graph's own order ONNX Runtime would widen all weights in 16 bits first."""
    taken = []
    create = onnxruntime.InferenceSession

    def created(data: bytes, options: onnxruntime.SessionOptions, **others: Any) -> Any:
        taken.append(options)
        return create(data, options, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", created)
    with open_session(tiny, component, provider="cpu", arena=False):
        pass
    (options,) = taken
    assert options.execution_order == getattr(onnxruntime.ExecutionOrder, order)
    assert not options.enable_cpu_mem_arena
    assert not options.enable_mem_pattern
