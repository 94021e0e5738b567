"""Compiled programs against the same network on ONNX Runtime, and who may load them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import wanx
from tests.support.engines import on_cpu, relative, rescheduled
from wanx.bundle.engine_schedule import SCHEDULE, EngineSchedule, read_schedule
from wanx.bundle.reader import Bundle
from wanx.errors import CorruptInputError, EnvironmentMismatchError
from wanx.exporter.calibration.options import CalibrationOptions
from wanx.exporter.partition.partition import Partition
from wanx.exporter.targets.aoti import AotiBuilder
from wanx.runtime.sessions import open_session
from wanx.runtime.sessions.aoti.session import AotiSession
from wanx.runtime.sessions.base import Session
from wanx.runtime.tokens import rope_tables

HERE = re.escape(torch.__version__)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The built-in model in fp8, of which the denoiser alone is compiled; test_bundle.py has all.

    Each program of the others takes as long as one of it.
    """
    folder = tmp_path_factory.mktemp("aoti") / "bundle"
    calibration = CalibrationOptions(prompts=1, steps=3, golden_steps=2)
    wanx.export("tiny", folder, precision="fp8", calibration=calibration)
    real = AotiBuilder.build

    def build(builder: AotiBuilder, name: str, parts: Partition, place: Path, *rest: Any) -> None:
        if name == "dit":
            real(builder, name, parts, place, *rest)
        else:
            place.mkdir(parents=True)
            (place / SCHEDULE).touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AotiBuilder, "build", build)
        return wanx.build(folder, target="aoti")


def random_feeds(bundle: Bundle, grid: tuple[int, int, int], seed: int) -> dict[str, Any]:
    dit = bundle.manifest.config.dit
    generator = np.random.default_rng(seed)
    length = int(np.prod(grid))
    shapes = {"tokens": (1, length, dit.token_dim), "context": (1, dit.text_len, dit.text_dim)}
    feeds = {n: generator.standard_normal(s, dtype=np.float32) for n, s in shapes.items()}
    return feeds | {"timestep": np.array([generator.uniform(1, 999)], np.float32)}


def bind(session: Session, bundle: Bundle, grid: tuple[int, int, int]) -> None:
    cos, sin = rope_tables(grid, bundle.manifest.config.dit.rope_dims)
    session.bind({"rope_cos": cos, "rope_sin": sin})


def test_weights_are_beside_the_programs(compiled: Bundle) -> None:
    schedule = read_schedule(compiled.root / compiled.manifest.components["dit"].engines["aoti"])
    assert schedule.device == ("cpu" if not torch.cuda.is_available() else schedule.device)
    types = {w.dtype for program in schedule.programs.values() for w in program.weights}
    assert "F8_E4M3" in types
    packages = sum(p.stat().st_size for p in (compiled.root / "engines").rglob("dit/*.pt2"))
    weights = (compiled.root / "weights" / "dit.safetensors").stat().st_size
    assert weights > 8e5
    assert packages < 5e6 * len(schedule.programs)


@pytest.mark.parametrize("grid", [(5, 4, 4), (1, 3, 4), (2, 5, 3)])
def test_the_denoiser_at_any_length(compiled: Bundle, grid: tuple[int, int, int]) -> None:
    answers = []
    for bundle in (compiled, on_cpu(compiled)):
        with open_session(bundle, "dit") as session:
            assert isinstance(session, AotiSession) == (bundle is compiled)
            bind(session, compiled, grid)
            answers.append(session.run(random_feeds(compiled, grid, 0))["velocity"])
    # Both round to 8 bits; a few numbers fall on the other side.
    assert relative(*answers) < 0.05


def test_two_branches_at_once_are_each_alone(compiled: Bundle) -> None:
    grid = (2, 4, 4)
    feeds = [random_feeds(compiled, grid, seed) for seed in (1, 2)]
    with open_session(compiled, "dit") as session:
        bind(session, compiled, grid)
        alone = [session.run(feed)["velocity"] for feed in feeds]
        apart = relative(alone[0], alone[1])
        assert apart > 0.1
        schedule = session._runner.schedule
        for limit in (0, 1000):
            session._runner.schedule = schedule.model_copy(update={"max_batched_tokens": limit})
            for found, wanted in zip(session.run_each(feeds), alone, strict=True):
                assert found["velocity"].shape == wanted.shape
                assert relative(found["velocity"], wanted) < apart / 4


def test_operators_are_timed(compiled: Bundle) -> None:
    """On the processor PyTorch sees no kernel inside a program, but every operator beside it."""
    matrix = torch.ones(64, 64)
    with open_session(compiled, "dit") as session:
        found = session.kernel_times(lambda: [matrix @ matrix for _ in range(3)])
    (product,) = [time for time in found if time.name == "aten::mm"]
    assert product.calls == 3
    assert 0 < product.seconds < 1


def test_building_again_builds_nothing(
    compiled: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(compiled.root, copy)
    assert wanx.build(copy, target="cpu").manifest.target == "cpu"

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr("wanx.exporter.targets.aoti.AotiBuilder.build", fail)
    assert wanx.build(copy, target="aoti").manifest == compiled.manifest


@pytest.mark.parametrize(
    ("update", "words"),
    [
        (
            {"compiler": "torch 2.0.0"},
            f"built by torch 2.0.0, and this is torch {HERE}",
        ),
        ({"device": "sm120"}, "built for sm120, and this machine"),
    ],
)
@pytest.mark.fault("engine of another machine")
def test_programs_of_another_machine(
    compiled: Bundle, tmp_path: Path, update: Mapping[str, Any], words: str
) -> None:
    bundle = rescheduled(compiled, tmp_path / "b", **update)
    with pytest.raises(EnvironmentMismatchError, match=words) as caught:
        open_session(bundle, "dit")
    assert f"`wanx build {bundle.root} --target aoti`" in str(caught.value)


@pytest.mark.fault("engine from elsewhere")
def test_programs_from_elsewhere(
    compiled: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(EnvironmentMismatchError, match=r"compiled elsewhere.*WANX_TRUST_ENGINES=1"):
        open_session(compiled, "dit")
    monkeypatch.setenv("WANX_TRUST_ENGINES", "1")
    open_session(compiled, "dit").close()


def test_a_plan_that_wants_other_weights(compiled: Bundle, tmp_path: Path) -> None:
    schedule = read_schedule(compiled.root / compiled.manifest.components["dit"].engines["aoti"])
    steps = [s.model_copy(update={"prefix": s.prefix.replace("1", "9")}) for s in schedule.steps]
    bundle = rescheduled(compiled, tmp_path / "b", steps=tuple(steps))
    with pytest.raises(CorruptInputError, match=r"lack 'blocks.9.* export it again"):
        open_session(bundle, "dit")


def test_without_pytorch(compiled: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanx.runtime.sessions.registry.find_spec", lambda _: None)
    with pytest.raises(EnvironmentMismatchError, match=r"pip install 'wanx\[export\]'"):
        open_session(compiled, "dit")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace('"embed.pt2"', '"../embed.pt2"'), "file"),
        (lambda text: text.replace('"tokens"', '"tokins"', 1), "reads tokens, which nothing makes"),
        (lambda text: text[:100], "not the schedule of an engine"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 2'), "schema_version"),
        (lambda text: text + " " * (8 << 20), "larger than"),
    ],
)
def test_a_plan_that_no_build_writes(
    compiled: Bundle, tmp_path: Path, change: Any, words: str
) -> None:
    path = compiled.root / compiled.manifest.components["dit"].engines["aoti"]
    schedule = EngineSchedule.model_validate_json(path.read_bytes())
    altered = tmp_path / SCHEDULE
    altered.write_text(change(schedule.to_json()))
    with pytest.raises(CorruptInputError, match=words):
        read_schedule(altered)
