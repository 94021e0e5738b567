"""Golden steps of bundles against raw ONNX Runtime and PyTorch."""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from tests.support.altered import altered_bundle, noise
from tests.support.golden_bundles import TASKS, Case, golden_case, with_golden_steps
from tests.support.peers import relative_error
from wanx.accuracy.gates import Agreement, Gates
from wanx.accuracy.golden_check import check_golden, require_golden
from wanx.bundle.golden_steps import GOLDEN, Golden
from wanx.bundle.reader import Bundle, open_bundle
from wanx.checkpoints.checkpoint import Checkpoint
from wanx.errors import CorruptInputError, GateError
from wanx.models.dit.model import WanDiT

FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16}
Tensors = dict[str, NDArray[np.float32]]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """A bundle for a task; tests must not change it."""
    folder = tmp_path_factory.mktemp("golden")
    return functools.cache(lambda task: golden_case(folder / task, task))


@pytest.fixture(scope="module")
def noisy(case: Callable[[str], Case], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The text-to-video model with other weights, and the golden steps of its own ones."""
    folder = tmp_path_factory.mktemp("noisy") / "noisy"
    return with_golden_steps(
        altered_bundle(folder, "dit", noise(0.5), prefix="blocks."), case("t2v").golden
    )


def samples_by_hand(path: Path) -> list[tuple[int, str, Tensors, NDArray[np.float32]]]:
    """Step, branch, feeds and velocity of everything in a file of golden steps."""
    tensors = load_file(path)
    found = []
    for name, velocity in tensors.items():
        if ".velocity." not in name:
            continue
        _, step, _, branch = name.split(".")
        used = tensors[f"context.{branch}"]
        context = np.zeros(tensors[f"context_shape.{branch}"], np.float32)
        context[:, : used.shape[1]] = used
        feeds = {n.removeprefix("constant."): v for n, v in tensors.items() if "constant." in n}
        feeds |= {n: tensors[f"step.{step}.{n}"] for n in ("tokens", "timestep")}
        found.append((int(step), branch, feeds | {"context": context}, velocity))
    return found


def whole_dit(checkpoint: Checkpoint) -> WanDiT:
    """The denoiser in PyTorch with all source weights."""
    dit = WanDiT(checkpoint.config.dit).requires_grad_(False)
    weights = {}
    for name, like in dit.state_dict().items():
        tensor = checkpoint.components["dit"].tensors[name]
        data = bytearray(b"".join(bytes(piece) for piece in tensor.iter_bytes()))
        values = torch.frombuffer(data, dtype=FLOATS[tensor.dtype])
        weights[name] = values.float().reshape(like.shape)
    dit.load_state_dict(weights)
    return dit


@pytest.mark.parametrize("task", TASKS)
def test_velocities_are_those_of_the_source_weights(task: str, case: Callable[[str], Case]) -> None:
    it = case(task)
    dit, samples = whole_dit(it.checkpoint), samples_by_hand(it.bundle.root / GOLDEN)
    assert len(samples) >= 4
    extra = {"t2v": set(), "i2v": {"image_context"}, "vace": {"vace_tokens", "vace_scale"}}[task]
    for _, _, feeds, velocity in samples:
        assert set(feeds) == {"tokens", "timestep", "context", "rope_cos", "rope_sin", *extra}
        expected = dit(**{name: torch.from_numpy(value) for name, value in feeds.items()})
        assert relative_error(velocity, expected) <= 1e-4


@pytest.mark.parametrize("which", ["t2v", "i2v", "vace", "noisy"])
def test_agreements_are_those_of_raw_onnxruntime(
    which: str, case: Callable[[str], Case], request: pytest.FixtureRequest
) -> None:
    bundle = request.getfixturevalue("noisy") if which == "noisy" else case(which).bundle
    options = onnxruntime.SessionOptions()
    folder = "session.model_external_initializers_file_folder_path"
    options.add_session_config_entry(folder, str(bundle.root))
    graph = (bundle.root / "graphs" / "dit.onnx").read_bytes()
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    wanted = {}
    for step, branch, feeds, velocity in samples_by_hand(bundle.root / GOLDEN):
        ours = session.run(["velocity"], feeds)[0].astype(np.float64).ravel()
        theirs = velocity.astype(np.float64).ravel()
        cosine = ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)
        error = np.sum((ours - theirs) ** 2)
        wanted[step, branch] = (
            feeds["timestep"][0],
            cosine,
            10 * math.log10(theirs @ theirs / error),
        )

    seen: list[tuple[str, int, int]] = []
    found = check_golden(bundle, threads=1, progress=lambda *told: seen.append(told[:3]))
    assert [(a.step, a.branch) for a in found] == sorted(wanted)
    assert seen == [("golden steps", n, len(wanted)) for n in range(1, len(wanted) + 1)]
    for a in found:
        timestep, cosine, sqnr = wanted[a.step, a.branch]
        assert (a.component, a.timestep) == ("dit", timestep)
        # The graph that runs is another one, so the last bits differ: all that there is at fp32.
        assert a.cosine == pytest.approx(cosine, abs=1e-6)
        assert a.sqnr_db == pytest.approx(sqnr, abs=0.01) if which == "noisy" else a.sqnr_db > 90
        assert (a.cosine < 0.99) == (which == "noisy")


def test_the_gate_names_the_worst_step(noisy: Bundle, case: Callable[[str], Case]) -> None:
    require_golden(check_golden(case("t2v").bundle, threads=1), Gates())
    found = check_golden(noisy, threads=1)
    least = min(found, key=lambda step: step.cosine)
    with pytest.raises(GateError) as caught:
        require_golden(found, Gates())
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("4 of 4 golden steps are below the gate")
    assert f"{least.cosine:.5f}" in message
    assert f"at step {least.step} ({least.branch})" in message
    require_golden(found, Gates(dit=least.cosine))
    with pytest.raises(GateError, match="1 of 4 golden steps"):
        require_golden(found, Gates(dit=math.nextafter(least.cosine, 1)))


def test_no_steps_pass() -> None:
    require_golden((), Gates())
    step = Agreement(component="dit", step=1, cosine=math.nan, sqnr_db=math.nan)
    with pytest.raises(GateError, match="1 of 1 golden steps are below the gate: cosine nan"):
        require_golden((step,), Gates())


def changed(golden: Golden, **changes: NDArray[np.float32]) -> Golden:
    """Other inputs of the last step, or other constants."""
    *steps, last = golden.steps
    inputs = {name: value for name, value in changes.items() if name in ("tokens", "timestep")}
    rest = {name: value for name, value in changes.items() if name not in inputs}
    last = replace(last, **inputs)
    return replace(golden, steps=(*steps, last), constants={**golden.constants, **rest})


def other_velocity(golden: Golden, change: Callable[[NDArray[np.float32]], object]) -> Golden:
    *steps, last = golden.steps
    values = {name: change(velocity) for name, velocity in last.velocities.items()}
    return replace(golden, steps=(*steps, replace(last, velocities=values)))


MISFITS: dict[str, tuple[Callable[[Golden], Golden], str]] = {
    "short velocity": (lambda g: other_velocity(g, lambda v: v[:, 1:]), "expects a velocity"),
    "flat velocity": (lambda g: other_velocity(g, np.ravel), "expects a velocity"),
    "velocity of one": (lambda g: other_velocity(g, lambda v: v[:, :1, :1]), "expects a velocity"),
    "short tokens": (lambda g: changed(g, tokens=g.steps[-1].tokens[:, 1:]), "cannot run dit"),
    "narrow tokens": (lambda g: changed(g, tokens=g.steps[-1].tokens[..., 1:]), "cannot run dit"),
    "another input": (lambda g: changed(g, mask=g.constants["rope_cos"]), "cannot run dit"),
    "no tables": (lambda g: replace(g, constants={}), "cannot run dit"),
    "narrow text": (
        lambda g: replace(g, contexts={n: c[..., 1:] for n, c in g.contexts.items()}),
        "cannot run dit",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_steps_that_do_not_fit_the_graph(
    misfit: str, case: Callable[[str], Case], tmp_path: Path
) -> None:
    change, words = MISFITS[misfit]
    shutil.copytree(case("t2v").bundle.root, tmp_path / "bundle")
    bundle = with_golden_steps(open_bundle(tmp_path / "bundle"), change(case("t2v").golden))
    with pytest.raises(CorruptInputError) as caught:
        check_golden(bundle, threads=1)
    assert "\n" not in str(caught.value)
    assert words in str(caught.value)


def test_answers_that_are_not_finite_fail(case: Callable[[str], Case], tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    bundle = altered_bundle(folder, "dit", lambda v: v * np.nan, prefix="head.head.bias")
    found = check_golden(with_golden_steps(bundle, case("t2v").golden), threads=1)
    assert all(math.isnan(step.cosine) for step in found)
    with pytest.raises(GateError, match="4 of 4"):
        require_golden(found, Gates())
