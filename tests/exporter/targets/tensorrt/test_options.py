"""Options of the builder, how far a build is, what it remembers, and that it can be stopped."""

from __future__ import annotations

import os
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from wanx.config.models import PRESETS
from wanx.errors import UsageError, WanxError
from wanx.exporter.components import dit_spec
from wanx.exporter.partition.partition import partition
from wanx.exporter.targets.options import DEFAULT_OPTIONS, BuilderOptions, parse_workspace
from wanx.exporter.targets.tensorrt.gpus import TensorRTTarget
from wanx.exporter.targets.tensorrt.ranges import ranges
from wanx.exporter.targets.tensorrt.target import TensorRTBuilder
from wanx.exporter.targets.tensorrt.timing_cache import TimingCache
from wanx.exporter.targets.tensorrt.worker import apply_options
from wanx.runtime.sessions.tensorrt.library import import_tensorrt

needs_rtx = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed"
)


@pytest.mark.parametrize(
    ("workspace", "size"),
    [("4G", 4 << 30), ("512M", 512 << 20), ("64k", 64 << 10), ("2048", 2048 << 20)],
)
def test_sizes_are_read_as_trtexec_reads_them(workspace: str, size: int) -> None:
    assert parse_workspace(workspace) == size


@pytest.mark.parametrize(
    ("workspace", "level", "text"),
    [
        ("4T", None, "--workspace 4T is not a size; give one such as 4G or 512M"),
        ("0", None, "--workspace 0 is not a size"),
        ("-1G", None, "--workspace -1G is not a size"),
        ("1.5G", None, "--workspace 1.5G is not a size"),
        (None, 6, "--opt-level 6 is not a level; choose 0 to 5"),
        (None, -1, "--opt-level -1 is not a level"),
    ],
)
def test_what_is_no_option(workspace: str | None, level: int | None, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        BuilderOptions(workspace=parse_workspace(workspace), opt_level=level)


def test_builds_with_other_options_are_told_apart() -> None:
    keys = {
        BuilderOptions(workspace=parse_workspace(w), opt_level=o).builder_key
        for w in (None, "1G", "2G")
        for o in (None, 0, 5)
    }
    assert len(keys) == 9
    assert DEFAULT_OPTIONS.builder_key == ""


@needs_rtx
def test_options_reach_the_builder() -> None:
    trt = import_tensorrt("tensorrt_rtx")
    config = trt.Builder(trt.Logger(trt.Logger.ERROR)).create_builder_config()
    apply_options(trt, config, BuilderOptions(workspace=1 << 28, opt_level=1))
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 1 << 28
    assert config.builder_optimization_level == 1
    with pytest.raises(WanxError, match="has no levels of optimisation; leave --opt-level out"):
        apply_options(trt, SimpleNamespace(), BuilderOptions(opt_level=1))


def builder(**options: int) -> TensorRTBuilder:
    return TensorRTBuilder(
        target=TensorRTTarget(name="rtx", sms=(89,)), ranges=ranges(PRESETS["tiny"]),
        options=BuilderOptions(**options),
    )  # fmt: skip


@needs_rtx
def test_a_build_tells_how_far_it_is(tmp_path: Path) -> None:
    told: list[float] = []
    parts = partition(dit_spec(PRESETS["tiny"].dit), torch.bfloat16)
    builder(workspace=1 << 28).build("dit", parts, tmp_path / "engines", told.append)
    assert len(told) > 20
    assert told == sorted(told)
    assert 0 < told[0] < 0.1 < 0.9 < told[-1] <= 1


@needs_rtx
def test_a_build_that_is_stopped_leaves_no_process(tmp_path: Path) -> None:
    def stop(done: float) -> None:
        assert workers()
        raise KeyboardInterrupt

    def workers() -> list[Any]:
        found = []
        for child in psutil.Process(os.getpid()).children():
            with suppress(psutil.Error):  # it has ended
                if "tensorrt.worker" in " ".join(child.cmdline()):
                    found.append(child)
        return found

    parts = partition(dit_spec(PRESETS["tiny"].dit), torch.bfloat16)
    with pytest.raises(KeyboardInterrupt):
        builder().build("dit", parts, tmp_path / "engines", stop)
    assert not workers()


class Config:
    """A builder's configuration of full TensorRT, as far as its timing cache goes."""

    def __init__(self, good: bytes) -> None:
        self.good = good
        self.taken: bytes | None = None

    def create_timing_cache(self, content: bytes) -> Any:
        return SimpleNamespace(content=content, serialize=lambda: b"measured")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache.content not in (b"", self.good):
            return False
        self.taken = cache.content
        return True


def test_what_was_measured_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "wanx" / "tensorrt" / "timing" / "99-90"
    first = Config(b"measured")
    cache = TimingCache(first, "99-90")
    assert first.taken == b""
    cache.write()
    assert path.read_bytes() == b"measured"
    second = Config(b"measured")
    TimingCache(second, "99-90").write()
    assert second.taken == b"measured"
    assert [p.name for p in path.parent.iterdir()] == ["99-90"]
    path.write_bytes(b"damaged")
    third = Config(b"measured")
    TimingCache(third, "99-90").write()
    assert third.taken == b""
    assert path.read_bytes() == b"measured"


def test_without_a_timing_cache_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    TimingCache(SimpleNamespace(), "99-90").write()
    assert list(tmp_path.iterdir()) == []
