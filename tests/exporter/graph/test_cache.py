"""Traced graphs that are kept, and those that are shipped."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest

from tests.support.users import not_root, public_folder
from tools.shipped_graphs import entries
from wanx.config.models import PRESETS, ModelConfig
from wanx.exporter.graph import cache as caches
from wanx.exporter.graph.cache import SHIPPED, GraphCache, graph_key, sources_digest, tensors_key
from wanx.exporter.graph.stored_graph import graph_from_bytes, graph_to_bytes
from wanx.exporter.quantization.recipe import Recipe, text_recipe
from wanx.exporter.quantization.scheme import SCHEMES, QuantizeOptions
from wanx.exporter.trace_component import trace_component

TINY = PRESETS["tiny"]
# A network that is not shipped.
SMALL = replace(TINY, text_encoder=replace(TINY.text_encoder, num_layers=1))


def trace_small() -> ir.Model:
    return trace_component("text_encoder", SMALL, None)


@pytest.fixture(scope="module")
def small() -> bytes:
    return graph_to_bytes(trace_small())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache of graphs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "wanx" / "graphs"


@pytest.fixture
def find(small: bytes) -> Callable[..., list[bool]]:
    """Look the small network up; one True for each trace that this took."""

    def act(*, use: bool = True, config: ModelConfig = SMALL) -> list[bool]:
        traces: list[bool] = []

        def trace() -> ir.Model:
            traces.append(True)
            return graph_from_bytes(small)

        found = GraphCache(use=use).graph("text_encoder", config, None, trace)
        assert graph_to_bytes(found) == small
        return traces

    return act


def test_a_graph_survives_its_bytes(small: bytes) -> None:
    model = graph_from_bytes(small)
    values = model.graph.initializers.values()
    assert {value.const_value is None for value in values} == {True, False}
    assert graph_to_bytes(model) == small
    assert any(value.const_value is None for value in values), "what was serialised has changed"


def test_the_second_time_traces_nothing(find: Callable[..., list[bool]], folder: Path) -> None:
    assert find() == [True]
    assert find() == []
    (entry,) = folder.iterdir()
    assert entry.stat().st_size < 20_000


def test_without_it_all_is_traced_and_nothing_kept(
    find: Callable[..., list[bool]], folder: Path
) -> None:
    assert find(use=False) == [True]
    assert not folder.exists()
    find()
    assert find(use=False) == [True]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: data[:20],
        lambda data: b"\0" * len(data),
        lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:],
        lambda data: data + b"x",
    ],
    ids=["cut", "empty", "cut short", "zeros", "a bit", "longer"],
)
@pytest.mark.fault("a damaged graph cache")
def test_a_damaged_entry_is_traced_again(
    damage: Callable[[bytes], bytes],
    find: Callable[..., list[bool]],
    folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    find()
    (entry,) = folder.iterdir()
    entry.write_bytes(damage(entry.read_bytes()))
    assert find() == [True]
    (line,) = caplog.messages
    assert line == f"{entry} is damaged; tracing its graph again"
    assert find() == []


@pytest.mark.fault("a graph cache that cannot be written")
def test_a_cache_that_cannot_be_written(
    find: Callable[..., list[bool]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert find() == [True]
    assert find() == [True]
    (line,) = caplog.messages
    assert line.startswith(f"the graph cache {tmp_path}/file/wanx/graphs cannot be written (")


@pytest.mark.fault("a graph cache that cannot be written")
def test_a_folder_of_somebody_else(
    find: Callable[..., list[bool]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with public_folder() as home, not_root():
        monkeypatch.setenv("XDG_CACHE_HOME", str(home))
        assert find() == [True]
    assert "cannot be written (Permission denied); it is not kept" in caplog.text


def test_it_is_bounded(
    find: Callable[..., list[bool]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was used longest ago goes first; using it counts."""
    find()
    (used,) = folder.iterdir()
    old = [folder / f"old-{number}.zlib" for number in range(3)]
    for number, path in enumerate(old):
        path.write_bytes(bytes(used.stat().st_size))
        os.utime(path, (1000 + number, 1000 + number))
    os.utime(used, (1, 1))
    assert find() == []
    monkeypatch.setattr(caches, "MAX_BYTES", int(used.stat().st_size * 3.5))
    find(config=replace(SMALL, text_encoder=replace(SMALL.text_encoder, eps=1e-7)))
    assert used.exists()
    assert [path.exists() for path in old] == [False, False, True]


def _fill(start: multiprocessing.synchronize.Event, data: bytes, number: int) -> None:
    start.wait()
    for eps in range(20):
        config = replace(TINY, text_encoder=replace(TINY.text_encoder, eps=1e-9 * (eps + 1)))
        found = GraphCache().graph("text_encoder", config, None, lambda: graph_from_bytes(data))
        assert graph_to_bytes(found) == data, number


@pytest.mark.usefixtures("folder")
@pytest.mark.fault("two exports that fill the graph cache")
def test_several_fill_it_at_once(
    small: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caches, "MAX_BYTES", 5 * len(small))
    context = multiprocessing.get_context("fork")
    start = context.Event()
    processes = [context.Process(target=_fill, args=(start, small, n)) for n in range(4)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    assert all(path.suffix == ".zlib" for path in folder.iterdir())
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 5 * len(small)


def recipe(**changes: object) -> Recipe:
    facts: dict[str, object] = {"layers": {"blocks.0.ffn.0": 0.5, "blocks.1.ffn.0": 0.25}}
    return Recipe(scheme=SCHEMES["int8"], **(facts | changes))  # type: ignore[arg-type]


def test_keys_follow_what_a_graph_depends_on() -> None:
    dit = replace(TINY.dit, eps=1e-5)
    same = [
        (TINY, recipe()),
        (replace(TINY, name="other", defaults=PRESETS["t2v-14B"].defaults), recipe()),
        (TINY, recipe(layers={"blocks.1.ffn.0": 7.0, "blocks.0.ffn.0": 3.0})),
        (TINY, recipe(sqnr_db={"blocks.0.ffn.0": 30.0})),
        (TINY, recipe(options=QuantizeOptions(percentile=99.0))),
    ]
    others = [
        (TINY, None),
        (replace(TINY, dit=dit), recipe()),
        (TINY, recipe(layers={"blocks.0.ffn.0": 0.5})),
        (TINY, recipe(layers={"blocks.0.ffn.0": 0.5, "blocks.1.ffn.0": None})),
        (TINY, replace(recipe(), scheme=SCHEMES["fp8"])),
        (TINY, recipe(options=QuantizeOptions(weight_scale="tensor"))),
        (TINY, recipe(attention={"blocks.0.self_attn.attend": (1.0, 1.0, 1.0)})),
    ]
    (key,) = {graph_key("dit", config, made) for config, made in same}
    keys = {graph_key("dit", config, made) for config, made in others}
    assert len(keys) == len(others)
    assert key not in keys
    first, rest = (graph_key(f"vae_decoder_up_{c}", TINY, None) for c in ("first", "rest"))
    assert len({first, rest, tensors_key("vae", TINY)}) == 3


@pytest.mark.parametrize("what", ["torch", "onnxscript", "wanx", "sources"])
def test_other_versions_trace_anew(
    what: str, find: Callable[..., list[bool]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find()
    if what == "wanx":
        monkeypatch.setattr(caches, "__version__", "9.9")
    elif what == "sources":
        monkeypatch.setattr(caches, "sources_digest", lambda: "other")
    else:
        version = caches._version
        monkeypatch.setattr(caches, "_version", lambda n: "9.9" if n == what else version(n))
    assert find() == [True]
    assert len(list(folder.iterdir())) == 2


STALE = "run python tools/shipped_graphs.py: what decides a trace has changed since it was run"


def test_what_is_shipped_is_up_to_date() -> None:
    with zipfile.ZipFile(SHIPPED) as archive:
        assert archive.read("sources").decode() == sources_digest(), STALE
        assert set(archive.namelist()) == {"sources", *(key for key, _ in entries())}, STALE
    assert SHIPPED.stat().st_size < 2_000_000


def _unique() -> dict[str, Callable[[], bytes]]:
    return dict(entries())


@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=[] if part == 7 else pytest.mark.slow) for part in range(8)]
)
def test_what_is_shipped_equals_a_trace(part: int) -> None:
    """Every eighth entry; all of them take minutes, and the digest says if they can differ."""
    unique = sorted(_unique().items())
    with zipfile.ZipFile(SHIPPED) as archive:
        for key, make in unique[part::8]:
            assert archive.read(key) == make(), STALE


def test_what_is_shipped_is_used(folder: Path) -> None:
    def trace() -> ir.Model:
        raise AssertionError("it is there")

    for config in (TINY, PRESETS["t2v-14B"]):
        recipes = [None, text_recipe(config.text_encoder)]
        for made in recipes:
            graph = GraphCache().graph("text_encoder", config, made, trace)
            assert graph.graph.name == "text_encoder"
    assert not folder.exists()


def test_shipped_graphs_of_other_code_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a change of a network: its old graph would be exported without a word."""
    shutil.copy(SHIPPED, tmp_path / "shipped.zip")
    monkeypatch.setattr(caches, "SHIPPED", tmp_path / "shipped.zip")
    monkeypatch.setattr(caches, "sources_digest", lambda: "other")
    caches._archive.cache_clear()
    try:
        assert caches._shipped(graph_key("text_encoder", TINY, None)) is None
    finally:
        monkeypatch.undo()
        caches._archive.cache_clear()
    assert caches._shipped(graph_key("text_encoder", TINY, None)) is not None


@pytest.mark.parametrize("damage", ["cut", "a byte", "no archive", "missing"])
@pytest.mark.fault("a damaged graph cache")
def test_a_damaged_archive_is_not_used(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copy(SHIPPED, tmp_path / "shipped.zip"))
    data = bytearray(copy.read_bytes())
    if damage == "cut":
        copy.write_bytes(data[: len(data) // 2])
    elif damage == "a byte":
        key = graph_key("dit", PRESETS["t2v-14B"], None)
        with zipfile.ZipFile(copy) as archive:
            entry = archive.getinfo(key)
        for place in range(entry.header_offset + 100, entry.header_offset + 400):
            data[place] ^= 0x55
        copy.write_bytes(data)
    elif damage == "no archive":
        copy.write_text("a pointer to a large file")
    else:
        copy.unlink()
    monkeypatch.setattr(caches, "SHIPPED", copy)
    caches._archive.cache_clear()
    try:
        assert caches._shipped(graph_key("dit", PRESETS["t2v-14B"], None)) is None
    finally:
        monkeypatch.undo()
        caches._archive.cache_clear()
