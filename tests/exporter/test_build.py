"""Engines that are built once, or anew where they come from elsewhere, and the advice of errors."""

from __future__ import annotations

import gc
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import wanx
from wanx.builtin import builtin_bundle
from wanx.bundle.engine_schedule import SCHEDULE
from wanx.bundle.reader import open_bundle
from wanx.bundle.trust import require_trusted
from wanx.cli import main
from wanx.errors import EnvironmentMismatchError, WanxError
from wanx.exporter.targets.base import Builder, Target
from wanx.exporter.targets.registry import TARGETS
from wanx.runtime.sessions.engine_session import EngineSession

UseCache = Callable[[str], None]


class FakeBuilder(Builder):
    """Writes a file a component, and counts."""

    device = "cpu"
    fingerprint = "torch 1"

    def __init__(self) -> None:
        self.builds = 0

    def compute_dtype(self, group: str, component: Any) -> torch.dtype:
        return torch.float32

    def build(self, component: str, parts: Any, folder: Path, on_fraction: Any = None) -> Any:
        self.builds += 1
        folder.mkdir(parents=True)
        (folder / SCHEDULE).write_text(f"{component}, build {self.builds}")


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> FakeBuilder:
    fake = FakeBuilder()
    target = Target(name="aoti", prepare=lambda manifest, options: fake)
    monkeypatch.setattr(
        "wanx.exporter.targets.registry.TARGETS", dict(TARGETS) | {"aoti": lambda text: target}
    )
    parts = SimpleNamespace(steps=(), segments={})
    monkeypatch.setattr("wanx.exporter.partition.partition.partition", lambda spec, dtype: parts)
    return fake


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(builtin_bundle(), tmp_path / "my bundle"))


@pytest.fixture(autouse=True)
def use_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> UseCache:
    """Be another user, or the same again."""

    def use(name: str) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache of {name}"))

    use("one")
    return use


def keys(bundle: Path) -> list[str]:
    """Folders of engines that are on disk, all of them listed."""
    gc.collect()  # tracebacks that hold a bundle
    files = open_bundle(bundle, verify="full").manifest.files
    present = sorted(path.name for path in (bundle / "engines").iterdir())
    assert sorted({name.split("/")[1] for name in files if name.startswith("engines/")}) == present
    return [name for name in present if name != "onnxruntime-cpu"]


def follow(error: WanxError, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Run the last command that an error advises."""
    *_, command = re.findall(r"`(wanx [^`]*)`", str(error))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)


def test_engines_are_built_once(bundle: Path, builder: FakeBuilder) -> None:
    first = wanx.build(bundle, target="aoti")
    assert first.manifest.target == "aoti"
    components = len(first.manifest.components)
    assert builder.builds == components
    assert wanx.build(bundle, target="aoti").manifest == first.manifest
    assert wanx.build(bundle, target="cpu").manifest.target == "cpu"
    assert wanx.build(bundle, target="aoti").manifest == first.manifest
    assert builder.builds == components


@pytest.mark.fault("advice that does not help", "engine from elsewhere")
def test_the_advice_for_engines_from_elsewhere(
    bundle: Path, builder: FakeBuilder, use_cache: UseCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = wanx.build(bundle, target="aoti").manifest
    require_trusted(open_bundle(bundle), "dit", "aoti")
    use_cache("another")
    with pytest.raises(EnvironmentMismatchError, match="compiled elsewhere") as caught:
        require_trusted(open_bundle(bundle), "dit", "aoti")
    follow(caught.value, monkeypatch, bundle.parent)
    del caught  # and with it the bundle as it was
    opened = open_bundle(bundle, verify="full")
    for component in opened.manifest.components:
        require_trusted(opened, component, "aoti")
    after = opened.manifest
    del opened
    assert after.files.keys() != before.files.keys()
    (key,) = keys(bundle)
    assert key.endswith("-2")
    builds = builder.builds
    assert wanx.build(bundle, target="aoti").manifest == after
    assert builder.builds == builds


def test_trusted_engines_stay(
    bundle: Path, builder: FakeBuilder, use_cache: UseCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = wanx.build(bundle, target="aoti").manifest
    use_cache("another")
    monkeypatch.setenv("WANX_TRUST_ENGINES", "1")
    assert wanx.build(bundle, target="aoti").manifest == before


def test_back_and_forth_between_two_machines(
    bundle: Path, builder: FakeBuilder, use_cache: UseCache
) -> None:
    """A shared folder: each build is the other's foreign one, and its engines go."""
    seen = []
    for user in ("one", "another", "one", "another"):
        use_cache(user)
        wanx.build(bundle, target="aoti")
        seen += keys(bundle)
        require_trusted(open_bundle(bundle), "dit", "aoti")
    first, second = seen[:2]
    assert seen == [first, second, first, second]
    assert second == f"{first}-2"


def test_forced(bundle: Path, builder: FakeBuilder) -> None:
    first = wanx.build(bundle, target="aoti")
    again = wanx.build(bundle, target="aoti", force=True)
    assert builder.builds == 2 * len(first.manifest.components)
    plan = again.root / again.manifest.components["dit"].engines["aoti"]
    assert plan.read_text() != f"dit, build {1 + list(first.manifest.components).index('dit')}"
    # The first bundle is still read, so its engines are still there.
    assert first.held(first.manifest.components["dit"].engines["aoti"]).exists()
    third = wanx.build(bundle, target="aoti", force=True)
    engines = [b.manifest.components["dit"].engines["aoti"] for b in (first, again, third)]
    assert len(set(engines)) == 3
    del first, again, third
    assert len(keys(bundle)) == 1


@pytest.mark.parametrize("change", [{"fingerprint": "torch 2"}, {"device": "sm120"}])
def test_another_compiler_or_device(
    bundle: Path, builder: FakeBuilder, monkeypatch: pytest.MonkeyPatch, change: dict[str, str]
) -> None:
    wanx.build(bundle, target="aoti")
    (before,) = keys(bundle)
    for name, value in change.items():
        monkeypatch.setattr(FakeBuilder, name, value)
    wanx.build(bundle, target="aoti")
    (after,) = keys(bundle)
    assert after != before
    assert not after.startswith(before)


@pytest.mark.fault("advice that does not help")
def test_the_advice_for_an_engine_that_fails(
    bundle: Path, builder: FakeBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the engines the bundle still runs."""
    wanx.build(bundle, target="aoti")

    before = builder.builds
    session: Any = SimpleNamespace(bundle=open_bundle(bundle), component="dit", target="aoti")
    with (
        pytest.raises(WanxError, match="illegal instruction") as caught,
        EngineSession._explained(session),
    ):
        raise RuntimeError("illegal instruction")
    del session
    again, without = re.findall(r"`(wanx [^`]*)`", str(caught.value))
    follow(WanxError(f"`{again}`"), monkeypatch, bundle.parent)
    assert builder.builds == 2 * before
    follow(WanxError(f"`{without}`"), monkeypatch, bundle.parent)
    video = wanx.load(bundle, threads=1)("a red circle", steps=1, frames=1, seed=0)
    assert video.frames is not None


@pytest.mark.fault("advice that does not help")
def test_the_advice_for_a_built_in_bundle(
    builder: FakeBuilder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(WanxError, match="is built in") as caught:
        wanx.build("tiny", target="aoti")
    follow(caught.value, monkeypatch, tmp_path)
    (made,) = (path for path in tmp_path.iterdir() if (path / "manifest.json").exists())
    assert open_bundle(made, verify="full").manifest.target == "aoti"
