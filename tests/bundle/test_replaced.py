"""Bundles that are replaced while they are read: the reader goes on with what it verified."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import wanx
from tests.bundle.test_publish import export, extend, names, text_of
from tests.support.altered import altered_bundle, noise
from tests.support.processes import running
from wanx.benchmarks.speed.suite import BenchOptions
from wanx.benchmarks.speed.trial import run_trial
from wanx.builtin import builtin_bundle
from wanx.bundle.publish import publish_bundle, record_files, write_manifest
from wanx.bundle.reader import Bundle, open_bundle, read_bundle
from wanx.bundle.recovery import find_leftovers
from wanx.errors import CorruptInputError, WanxError
from wanx.runtime.options import RunOptions

HOLD = """
import sys, time
from wanx.bundle.reader import open_bundle
bundle = open_bundle(sys.argv[1])
print("open", flush=True)
time.sleep(600)
"""


def tokenizer(bundle: Bundle) -> str:
    return bundle.held(bundle.tokenizer_path).read_text()


@pytest.mark.fault("bundle replaced during a run")
def test_an_open_bundle_stays_what_it_was(tmp_path: Path) -> None:
    target = tmp_path / "b"
    export(target, "one")
    first = open_bundle(target)
    export(target, "two", force=True)
    second = open_bundle(target)
    export(target, "three", force=True)
    assert [tokenizer(first), tokenizer(second), text_of(target)] == ["one", "two", "three"]
    assert names(tmp_path) == [".b.wanx-old.1.partial", ".b.wanx-old.2.partial", "b"]
    assert find_leftovers(tmp_path, remove=True) == []
    del first
    assert len(find_leftovers(tmp_path)) == 1
    assert text_of(target) == "three"
    assert names(tmp_path) == [".b.wanx-old.2.partial", "b"]
    assert tokenizer(second) == "two"
    del second
    export(target, "four", force=True)
    assert names(tmp_path) == ["b"]


def test_a_reader_that_is_killed_holds_nothing(tmp_path: Path) -> None:
    target = tmp_path / "b"
    export(target, "one")
    with running(HOLD, target, says="open"):
        export(target, "two", force=True)
        assert names(tmp_path) == [".b.wanx-old.1.partial", "b"]
    assert text_of(target) == "two"
    assert names(tmp_path) == ["b"]


def test_engines_that_a_build_leaves_out_stay_for_their_readers(tmp_path: Path) -> None:
    target = tmp_path / "b"
    export(target, "one")
    extend(target, "old", "old plan")
    reader = open_bundle(target)
    extend(target, "new", "new plan")
    assert reader.held("engines/old/plan.json").read_text() == "old plan"
    assert not any(name.startswith("engines/old/") for name in open_bundle(target).manifest.files)
    assert names(target / "engines") == ["new", "old"]
    del reader
    open_bundle(target, verify="full")
    assert names(target / "engines") == ["new"]


def test_errors_name_files_as_the_user_knows_them(tmp_path: Path) -> None:
    export(tmp_path / "b", "one")
    bundle = open_bundle(tmp_path / "b")
    assert bundle.held("x") != tmp_path / "b" / "x"
    with pytest.raises(CorruptInputError) as caught, bundle.names_in_errors():
        raise CorruptInputError(f"{bundle.held('x')} is bad, and so is {bundle.held('y')}")
    assert str(caught.value) == f"{tmp_path}/b/x is bad, and so is {tmp_path}/b/y"


@pytest.mark.parametrize("name", ["graphs/dit.onnx", "tokenizer/tokenizer.json"])
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, name: str) -> None:
    shutil.copytree(builtin_bundle(), tmp_path / "b")
    pipeline = wanx.load(tmp_path / "b", threads=1)
    (tmp_path / "b" / name).write_bytes(b"\x08\x07")
    for engine in (tmp_path / "b/engines").rglob("*.onnx"):
        engine.write_bytes(b"\x08\x07")
    with pytest.raises(CorruptInputError) as caught:
        pipeline("a red circle", steps=1, frames=1)
    assert "/proc/" not in str(caught.value)


class Swap:
    """Replaces a bundle by another one when a stage begins to count, once."""

    def __init__(self, target: Path, other: Path, stage: str) -> None:
        self.target, self.other, self.stage = target, other, stage
        self.done = False

    def __call__(self, stage: str, done: int, total: int, unit: Any) -> None:
        if self.stage not in stage or self.done:
            return
        self.done = True
        with publish_bundle(self.target, force=True) as folder:
            shutil.copytree(self.other, folder, dirs_exist_ok=True)
            write_manifest(folder, read_bundle(self.other).manifest)


@pytest.fixture
def bundles(tmp_path: Path) -> tuple[Path, Path]:
    """The built-in bundle, and one that computes something else in all its networks."""
    one, other = tmp_path / "one", tmp_path / "other"
    shutil.copytree(builtin_bundle(), one)
    altered_bundle(other, "vae", lambda values: -values, prefix="decoder.head")
    altered = altered_bundle(tmp_path / "noisy", "dit", noise(0.5))
    shutil.copy(altered.root / "weights/dit.safetensors", other / "weights")
    manifest = read_bundle(other).manifest
    write_manifest(other, manifest.model_copy(update={"files": record_files(other)}))
    return one, other


RUN: dict[str, Any] = {"steps": 3, "width": 32, "height": 32, "frames": 5, "seed": 1}


@pytest.mark.parametrize("stage", ["encode text", "denoise", "decode"])
@pytest.mark.fault("bundle replaced during a run")
def test_a_run(bundles: tuple[Path, Path], stage: str) -> None:
    one, other = bundles
    before, after = (wanx.load(path, threads=1)("a red circle", **RUN).frames for path in bundles)
    assert before is not None
    assert after is not None
    assert not np.array_equal(before, after)
    swap = Swap(one, other, stage)
    frames = wanx.load(one, threads=1)("a red circle", progress=swap, **RUN).frames
    assert swap.done
    assert frames is not None
    assert np.array_equal(frames, before)
    new = wanx.load(one, threads=1)("a red circle", **RUN).frames
    assert new is not None
    assert np.array_equal(new, after)
    assert names(one.parent) == ["noisy", "one", "other"]


@pytest.mark.fault("bundle replaced during a run")
def test_a_verification(bundles: tuple[Path, Path]) -> None:
    one, other = bundles
    swap = Swap(one, other, "verify")
    verification = wanx.verify(one, threads=1, progress=swap)
    assert swap.done
    assert verification.intact
    verification.require_accuracy()
    replaced = wanx.verify(one, threads=1)
    assert replaced.intact
    with pytest.raises(WanxError, match="golden steps are below the gate"):
        replaced.require_accuracy()


@pytest.mark.fault("bundle replaced during a run")
def test_a_comparison(bundles: tuple[Path, Path]) -> None:
    one, other = bundles
    seen: list[str] = []

    def compared(progress: Callable[..., None]) -> list[float]:
        result = wanx.compare(one, other, clips=False, threads=1, progress=progress, **RUN)
        return [item.cosine for run in result.runs for item in run.steps]

    before = compared(lambda stage, *_: seen.append(stage))
    swap = Swap(one, other, seen[0])
    assert compared(swap) == before
    assert swap.done
    assert min(before) < 0.999 < min(compared(lambda *_: None))


@pytest.mark.fault("bundle replaced during a run")
def test_a_benchmark(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    one, other = bundles
    swap = Swap(one, other, "denoise")
    run = RunOptions(prompt="a red circle", seed=0, steps=2)
    options = BenchOptions(run=run, sizes=((32, 32),), frames=5, repeat=2, warm_up=0, threads=1)
    results = wanx.bench(one, output=tmp_path / "report", options=options, progress=swap)
    assert swap.done
    assert results.problems == ()
    assert len(results.trials) == 2


def test_a_trial_measures_no_other_bundle(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    one, other = bundles
    bundle = open_bundle(one)
    impostor = Bundle(other, bundle.manifest, bundle.hash)
    with pytest.raises(WanxError, match="other was replaced while it was measured"):
        run_trial(impostor, {"frames": 1, "references": []}, tmp_path, name="x", threads=1)
