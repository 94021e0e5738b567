"""Calibration against a loop over the whole network, and what it keeps between two attempts."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import wanx.exporter.calibration.state as calibration_state
from tests.support.peers import relative_error
from tests.support.small_models import Task, load_dit, record_inputs, small_model
from wanx.bundle.reader import Bundle
from wanx.checkpoints.checkpoint import Checkpoint
from wanx.config.models import PRESETS
from wanx.errors import CorruptInputError, UsageError, WanxError
from wanx.exporter.calibration.blockwise_dit import BlockwiseDiT
from wanx.exporter.calibration.calibrate import calibrate, golden_numbers, record_golden
from wanx.exporter.calibration.options import CalibrationOptions, planned_runs
from wanx.exporter.calibration.state import Calibration, state_path
from wanx.exporter.quantization.recipe import Recipe, dit_candidates, shared_input
from wanx.exporter.quantization.recipe_cache import load_recipe, save_recipe
from wanx.exporter.quantization.scheme import SCHEMES, QuantizeOptions
from wanx.runtime.run_parts import RunParts
from wanx.runtime.sampling.noise import randn
from wanx.runtime.sampling.solvers import make_sampler
from wanx.runtime.sessions import open_session
from wanx.runtime.sizes import check_size, latent_shape
from wanx.runtime.text import PromptTokenizer, encode_prompt
from wanx.runtime.tokens import patchify, rope_tables, token_grid, unpatchify

OPTIONS = CalibrationOptions(prompts=2, steps=3, width=32, height=48, frames=5, golden_steps=2)
Model = tuple[Checkpoint, Bundle]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "wanx" / "calibration"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A checkpoint and a bundle; tests must not change them."""
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of samples with every step that the denoiser runs."""
    counts: list[int] = []
    run = BlockwiseDiT.run

    def counted(self: BlockwiseDiT, feeds: Sequence[Any], **options: Any) -> Any:
        answer = run(self, feeds, **options)
        counts.append(len(feeds))
        return answer

    monkeypatch.setattr(BlockwiseDiT, "run", counted)
    return counts


def points_of(checkpoint: Checkpoint) -> set[str]:
    config = checkpoint.config.dit
    names = {shared_input(name) for name in dit_candidates(config, QuantizeOptions())[0]}
    return names | {f"blocks.{i}.self_attn.attend" for i in range(config.num_layers)}


def by_hand(
    checkpoint: Checkpoint, bundle: Bundle, options: CalibrationOptions
) -> tuple[dict[str, list[Tensor]], list[list[dict[str, Any]]]]:
    """Everything that the linears of the whole network see, and each step of each run."""
    config, dit = checkpoint.config, load_dit(checkpoint)
    seen, history = record_inputs(dit), []
    for run, inputs in planned_runs(options, config):
        with open_session(bundle, "text_encoder") as session:
            prompts = {"conditional": run.prompt, "unconditional": run.negative_prompt}
            tokenizer = PromptTokenizer(bundle.tokenizer_path)
            contexts = {
                branch: encode_prompt(session, tokenizer, prompt, config.dit.text_len)
                for branch, prompt in prompts.items()
            }
        given = RunParts.of(bundle).condition(run, inputs)
        latent = randn(latent_shape(run.width, run.height, run.frames, config.vae), run.seed)
        grid = token_grid(latent.shape)
        cos, sin = rope_tables(grid, config.dit.rope_dims)
        constants = {"rope_cos": cos, "rope_sin": sin} | given.constants
        sampler = make_sampler(run.solver, run.steps, run.shift)
        steps = []
        for timestep in sampler.timesteps:
            parts = [latent] if given.channels is None else [latent, given.channels]
            feeds = constants | {
                "tokens": patchify(np.concatenate(parts))[None],
                "timestep": np.array([timestep], np.float32),
            }
            answers = {
                branch: dit(**{k: torch.from_numpy(v) for k, v in (feeds | {"context": c}).items()})
                for branch, c in contexts.items()
            }
            conditional, unconditional = answers["conditional"], answers["unconditional"]
            guided = unconditional + run.guide_scale * (conditional - unconditional)
            velocity = unpatchify(guided[0].numpy(), grid)
            latent = sampler.step(velocity, latent)
            steps.append({"feeds": feeds, "answers": answers, "guided": velocity})
        history.append(steps)
    return seen, history


@pytest.mark.parametrize("task", ["t2v", "i2v", "vace"])
def test_it_sees_what_the_whole_network_sees(task: Task, tmp_path: Path) -> None:
    checkpoint, bundle = small_model(tmp_path / "model", task)
    state = calibrate(checkpoint, bundle, OPTIONS, points_of(checkpoint))
    seen, history = by_hand(checkpoint, bundle, OPTIONS)

    wanted = {shared_input(name) for name in seen if not name.endswith("_proj")}
    if task == "vace":
        wanted -= {name for name in seen if "vace" in name and ".attend." in name}
    assert set(state.observers.points) == wanted
    for name, point in state.observers.points.items():
        values = torch.cat([x.flatten(0, -2) for x in seen[name]]).abs()
        assert point.count == values.numel()
        assert relative_error(point.channel_amax, values.amax(0)) <= 1e-4, name
        for q in (50, 99):
            exact = float(np.quantile(values.numpy(), q / 100, method="inverted_cdf"))
            assert point.percentile(q) == pytest.approx(exact, rel=0.035), name

    for found, steps in zip(state.history, history, strict=True):
        assert len(found) == len(steps) == OPTIONS.steps
        for velocity, step in zip(found, steps, strict=True):
            assert relative_error(velocity, step["guided"]) <= 1e-4

    golden = state.golden
    assert golden is not None
    assert [step.step for step in golden.steps] == [1, 3]
    for recorded, branch, feeds in golden.samples():
        step = history[0][recorded.step - 1]
        assert relative_error(recorded.velocities[branch], step["answers"][branch]) <= 1e-4
        for name, value in step["feeds"].items():
            assert relative_error(feeds[name], value) <= 1e-4, name


def test_layers_that_share_an_input_are_watched_once(model: Model) -> None:
    state = calibrate(*model, OPTIONS, points_of(model[0]))
    assert not any(
        name.endswith(("self_attn.k", "self_attn.v", "cross_attn.v"))
        for name in state.observers.points
    )


def interrupt_step(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Stop before the denoiser runs a step, when ``after`` steps have run."""
    run, calls = BlockwiseDiT.run, []

    def stopping(self: BlockwiseDiT, *arguments: Any, **options: Any) -> Any:
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(1)
        return run(self, *arguments, **options)

    monkeypatch.setattr(BlockwiseDiT, "run", stopping)


def interrupting_progress(after: int) -> Callable[..., None]:
    """Stop in the middle of a step, when a block of two has been told after ``after`` steps."""

    def progress(stage: str, done: int, total: int, unit: str) -> None:
        assert (stage, total, unit) == ("calibrate", 2 * OPTIONS.steps, "steps")
        if done == 2 * after + 1:
            raise KeyboardInterrupt

    return progress


def same(first: Calibration, second: Calibration) -> bool:
    """Bit for bit, in memory and as saved."""
    a, b = first.golden, second.golden
    assert a is not None
    assert b is not None
    states = first.observers.state(), second.observers.state()
    arrays = [
        [
            *(v for velocities in state.history for v in velocities),
            *golden.constants.values(),
            *golden.contexts.values(),
            *(x for s in golden.steps for x in (s.tokens, s.timestep, *s.velocities.values())),
        ]
        for state, golden in ((first, a), (second, b))
    ]
    return (
        a.run == b.run
        and [(s.step, *s.velocities) for s in a.steps] == [(s.step, *s.velocities) for s in b.steps]
        and list(a.contexts) == list(b.contexts)
        and list(states[0]) == list(states[1])
        and all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        and [len(v) for v in first.history] == [len(v) for v in second.history]
        and all(x.tobytes() == y.tobytes() for x, y in zip(*arrays, strict=True))
    )


@pytest.mark.parametrize("kind", ["before a step", "within a step"])
@pytest.mark.parametrize("done", [0, 1, 2])
def test_an_interrupted_calibration_goes_on(
    done: int,
    kind: str,
    model: Model,
    cache: Path,
    forwards: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    points = points_of(model[0])
    with monkeypatch.context() as patch:
        if kind == "before a step":
            interrupt_step(patch, done)
            with pytest.raises(KeyboardInterrupt):
                calibrate(*model, OPTIONS, points)
        else:
            with pytest.raises(KeyboardInterrupt):
                calibrate(*model, OPTIONS, points, interrupting_progress(done))
    assert len(list(cache.glob("*"))) == (done > 0)
    assert forwards == [4] * done
    resumed = calibrate(*model, OPTIONS, points)
    assert forwards == [4] * OPTIONS.steps
    (file,) = cache.iterdir()
    kept = load_file(file)

    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "another"))
    whole = calibrate(*model, OPTIONS, points)
    assert same(resumed, whole)
    assert whole.path is not None
    assert whole.path.name == file.name
    again = load_file(whole.path)
    assert list(kept) == list(again)
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_a_finished_calibration_is_read_and_nothing_runs(
    model: Model, cache: Path, forwards: list[int]
) -> None:
    first = calibrate(*model, OPTIONS, points_of(model[0]))
    (file,) = cache.iterdir()
    before = file.stat().st_mtime_ns
    second = calibrate(*model, OPTIONS, points_of(model[0]))
    assert len(forwards) == OPTIONS.steps
    assert same(first, second)
    assert file.stat().st_mtime_ns == before


def test_a_fresh_calibration_reads_nothing(model: Model, forwards: list[int]) -> None:
    first = calibrate(*model, OPTIONS, points_of(model[0]))
    second = calibrate(*model, replace(OPTIONS, fresh=True), points_of(model[0]))
    assert len(forwards) == 2 * OPTIONS.steps
    assert first.path == second.path
    assert same(first, second)


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def zeros_at_the_end(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"not a file of tensors",
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: flip(data, 3),
        lambda data: flip(data, 12),
        lambda data: flip(data, len(data) // 2),
        lambda data: flip(data, len(data) - 1),
        zeros_at_the_end,
        lambda data: bytes(len(data)),
    ],
)
def test_a_damaged_state_is_ignored(
    damage: Callable[[bytes], bytes], model: Model, cache: Path, forwards: list[int]
) -> None:
    options = replace(OPTIONS, prompts=1, steps=1)
    first = calibrate(*model, options, points_of(model[0]))
    (file,) = cache.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    second = calibrate(*model, options, points_of(model[0]))
    assert len(forwards) == 2
    assert same(first, second)
    calibrate(*model, options, points_of(model[0]))
    assert len(forwards) == 2


def test_a_kill_while_saving_leaves_the_step_before(
    model: Model, cache: Path, forwards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    saves: list[int] = []

    def stop_second(source: Path, target: Path) -> None:
        saves.append(1)
        if len(saves) == 2:
            raise KeyboardInterrupt
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop_second)
        with pytest.raises(KeyboardInterrupt):
            calibrate(*model, OPTIONS, points_of(model[0]))
    assert len(forwards) == 2
    (file,) = cache.iterdir()
    assert file.suffix == ".safetensors"
    calibrate(*model, OPTIONS, points_of(model[0]))
    assert len(forwards) == 1 + OPTIONS.steps


def test_without_a_cache_it_calibrates_all_the_same(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forwards: list[int]
) -> None:
    options = replace(OPTIONS, prompts=1, steps=1)
    first = calibrate(*model, options, points_of(model[0]))
    (tmp_path / "file").write_text("in the way of a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert same(first, calibrate(*model, options, points_of(model[0])))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *_, **__: Path("~/.cache/wanx"))
    homeless = calibrate(*model, options, points_of(model[0]))
    assert homeless.path is None
    assert same(first, homeless)
    assert len(forwards) == 3
    assert not (tmp_path / "~").exists()


def key(checkpoint: Checkpoint, bundle: Bundle, options: CalibrationOptions, *asked: object) -> str:
    path = state_path(checkpoint, bundle, planned_runs(options, checkpoint.config), asked)
    assert path is not None
    return path.name


def test_whatever_changes_what_is_seen_changes_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, bundle = small_model(tmp_path / "model")
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a", "seed": 1}\n{"prompt": "b", "seed": 1}')
    base = replace(OPTIONS, file=prompts)
    first = key(checkpoint, bundle, base, "x")
    assert key(checkpoint, bundle, base, "x") == first
    assert key(checkpoint, bundle, replace(base, fresh=True), "x") == first
    keys = {
        "another point": key(checkpoint, bundle, base, "y"),
        "fewer prompts": key(checkpoint, bundle, replace(base, prompts=1), "x"),
        "steps": key(checkpoint, bundle, replace(base, steps=4), "x"),
        "width": key(checkpoint, bundle, replace(base, width=48), "x"),
        "frames": key(checkpoint, bundle, replace(base, frames=9), "x"),
    }
    for name, line in (
        ("prompt", '{"prompt": "c", "seed": 1}'),
        ("seed", '{"prompt": "a", "seed": 2}'),
        ("scale", '{"prompt": "a", "seed": 1, "guide_scale": 4}'),
    ):
        prompts.write_text(f'{line}\n{{"prompt": "b", "seed": 1}}')
        keys[name] = key(checkpoint, bundle, base, "x")
    prompts.write_text('{"prompt": "a", "seed": 1}\n{"prompt": "b", "seed": 1}')
    assert key(checkpoint, bundle, base, "x") == first

    with monkeypatch.context() as patch:
        patch.setattr(calibration_state, "__version__", "99")
        keys["version"] = key(checkpoint, bundle, base, "x")
    files = dict(bundle.manifest.files)
    files["weights/text_encoder.safetensors"] = files["weights/vae.safetensors"]
    changed = bundle.manifest.model_copy(update={"files": files})
    keys["text encoder"] = key(checkpoint, Bundle(bundle.root, changed, "0"), base, "x")
    file = tmp_path / "model" / "dit.safetensors"
    os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns + 1))
    keys["weights"] = key(checkpoint, bundle, base, "x")
    assert len({first, *keys.values()}) == 1 + len(keys), keys


def test_an_image_counts_by_its_pixels(tmp_path: Path) -> None:
    """Two of the same name in different folders, and one that is written again."""
    checkpoint, bundle = small_model(tmp_path / "model", "i2v")

    def picture(folder: str, color: tuple[int, int, int]) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), color).save(tmp_path / folder / "a.png")
        (tmp_path / folder / "p.jsonl").write_text('{"prompt": "a", "seed": 1, "image": "a.png"}')
        options = replace(OPTIONS, file=tmp_path / folder / "p.jsonl", prompts=1)
        return key(checkpoint, bundle, options)

    red = picture("one", (200, 0, 0))
    assert picture("two", (200, 0, 0)) == red
    assert picture("two", (0, 0, 200)) != red
    assert picture("two", (200, 0, 0)) == red


@pytest.mark.parametrize(
    ("steps", "count", "numbers"),
    [
        (6, 3, {1, 4, 6}),
        (20, 3, {1, 10, 20}),
        (1, 3, {1}),
        (2, 3, {1, 2}),
        (50, 1, {1}),
        (5, 5, {1, 2, 3, 4, 5}),
        (7, 0, set()),
        (3, 2, {1, 3}),
    ],
)
def test_golden_numbers(steps: int, count: int, numbers: set[int]) -> None:
    assert golden_numbers(steps, count) == numbers


def test_golden_numbers_are_spread_evenly() -> None:
    for steps in range(1, 40):
        for count in range(2, 45):
            numbers = sorted(golden_numbers(steps, count))
            assert len(numbers) == min(steps, count)
            assert numbers[0] == 1
            assert numbers[-1] == steps
            gaps = np.diff(numbers)
            assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("steps", [1, 2])
def test_golden_steps_alone(steps: int, model: Model, cache: Path) -> None:
    options = replace(OPTIONS, golden_steps=steps)
    golden = record_golden(*model, options)
    assert [step.step for step in golden.steps] == list(range(1, steps + 1))
    assert not cache.exists()
    _, history = by_hand(*model, replace(OPTIONS, steps=steps, prompts=1))
    for step, branch, _ in golden.samples():
        expected = history[0][step.step - 1]["answers"][branch]
        assert relative_error(step.velocities[branch], expected) <= 1e-4
    (run,) = (run for run, _ in planned_runs(replace(OPTIONS, prompts=1, steps=steps),
                                             model[0].config))  # fmt: skip
    assert golden.run == {k: str(v) for k, v in asdict(run).items() if v is not None}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("max_tokens", [1280, 320, 100])
def test_chosen_sizes_are_small_and_valid(preset: str, max_tokens: int) -> None:
    config = PRESETS[preset]
    options = CalibrationOptions(prompts=1, max_tokens=max_tokens)
    ((run, _),) = planned_runs(options, config)
    check_size(run.width, run.height, run.frames, config)
    _, times, rows, columns = latent_shape(run.width, run.height, run.frames, config.vae)
    tokens = times * rows * columns // config.dit.patch_volume
    assert tokens <= max_tokens
    if preset.startswith("tiny"):
        assert (run.width, run.height, run.frames) == (64, 64, 17)
    else:
        assert tokens >= max_tokens / 2
        assert run.width > run.height
        assert run.frames == 17


def test_sizes_that_are_asked_for(tmp_path: Path) -> None:
    """The options go before the line of the file, and that before what would be cheap."""
    config = PRESETS["t2v-14B"]
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a", "size": "320x192", "frames": 9, "steps": 44}')
    ((run, _),) = planned_runs(CalibrationOptions(file=file), config)
    assert (run.width, run.height, run.frames, run.steps) == (320, 192, 9, 6)
    asked = CalibrationOptions(file=file, width=160, height=480, frames=81, steps=2)
    ((run, _),) = planned_runs(asked, config)
    assert (run.width, run.height, run.frames, run.steps) == (160, 480, 81, 2)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"width": 0}, "width must be a multiple of 16 and at least 16, not 0"),
        ({"height": 50}, "use 48 or 64"),
        ({"frames": 0}, "frames must be 4n+1"),
        ({"frames": 16}, "use 13 or 17"),
    ],
)
def test_sizes_that_no_model_has(sizes: dict[str, int], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        planned_runs(CalibrationOptions(**sizes), PRESETS["t2v-14B"])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        (None, UsageError, "p.jsonl is not there"),
        ("", UsageError, "has no lines"),
        ("\n  \n", UsageError, "has no lines"),
        ('{"prompt": "a"}\n{"prompt": ', CorruptInputError, "line 2 of"),
        ('{"prompt": "a"}\n\n["a"]', CorruptInputError, "line 3 of"),
        ('{"promt": "a"}', UsageError, "line 1 of"),
        ('{"prompt": "a", "image": "x.png"}', UsageError, "takes no --image"),
        ('{"prompt": "a", "guide_scale": NaN}', WanxError, "line 1 of"),
    ],
)
def test_files_that_cannot_be(
    text: str | None, error: type[WanxError], words: str, model: Model, tmp_path: Path, cache: Path
) -> None:
    file = tmp_path / "p.jsonl"
    if text is not None:
        file.write_text(text)
    with pytest.raises(error) as caught:
        calibrate(*model, replace(OPTIONS, file=file), points_of(model[0]))
    assert words in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not cache.exists()


def overflow(weights: dict[str, Tensor]) -> None:
    weights["blocks.1.ffn.0.weight"].fill_(3e38)


def invert(weights: dict[str, Tensor]) -> None:
    weights["blocks.1.cross_attn.v.weight"][3, 5] = float("nan")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (overflow, WanxError, "in the input of blocks.1.ffn.2 while calibrating"),
        (invert, CorruptInputError, "'blocks.1.cross_attn.v.weight' holds NaN"),
    ],
)
def test_what_is_not_finite_is_named(
    change: Callable[[dict[str, Tensor]], None],
    error: type[WanxError],
    words: str,
    tmp_path: Path,
    cache: Path,
) -> None:
    checkpoint, bundle = small_model(tmp_path / "model", change=change)
    with pytest.raises(error) as caught:
        calibrate(checkpoint, bundle, OPTIONS, points_of(checkpoint))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not cache.exists()


RECIPE = Recipe(
    scheme=SCHEMES["fp8"],
    options=QuantizeOptions(smooth=0.5, attention="fp8"),
    layers={"blocks.1.ffn.0": 0.1, "blocks.0.ffn.2": None},
    unquantized_layers={"blocks.0.ffn.0": "SQNR 3.0 dB, below 25"},
    sqnr_db={"blocks.1.ffn.0": 1 / 3, "blocks.0.ffn.0": 3.0},
    smooth={"blocks.1.ffn_smooth": torch.tensor([0.1, 7.0])},
    attention={"blocks.0.self_attn.attend": (0.1, 0.2, 1 / 7)},
)


@pytest.mark.parametrize("recipe", [RECIPE, replace(RECIPE, smooth={}, attention={})])
def test_a_recipe_is_kept(recipe: Recipe, tmp_path: Path) -> None:
    save_recipe(recipe, tmp_path / "r.safetensors")
    found = load_recipe(tmp_path / "r.safetensors", recipe.scheme, recipe.options)
    assert found is not None
    assert replace(found, smooth={}) == replace(recipe, smooth={})
    assert list(found.layers) == list(recipe.layers)
    assert found.smooth.keys() == recipe.smooth.keys()
    assert all(torch.equal(found.smooth[name], recipe.smooth[name]) for name in recipe.smooth)


def test_a_damaged_recipe_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    assert load_recipe(path, RECIPE.scheme, RECIPE.options) is None
    save_recipe(RECIPE, path)
    data = path.read_bytes()
    for place in range(0, len(data), 7):
        path.write_bytes(flip(data, place))
        assert load_recipe(path, RECIPE.scheme, RECIPE.options) is None, place


def test_a_file_of_something_else_is_no_state(tmp_path: Path) -> None:
    save_recipe(RECIPE, tmp_path / "r.safetensors")
    assert Calibration.load(tmp_path / "r.safetensors", 2).history == [[], []]
    path = tmp_path / "s.safetensors"
    Calibration(history=[[], []], path=path).save()
    assert load_recipe(path, RECIPE.scheme, RECIPE.options) is None
