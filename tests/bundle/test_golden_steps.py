"""Golden steps on disk: what is written comes back, and what is damaged is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from wanx.bundle.golden_steps import Golden, GoldenStep, read_golden, write_golden
from wanx.errors import CorruptInputError

Tensors = dict[str, np.ndarray]
RUN = '{"prompt": "a red circle"}'


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def context(length: int, width: int, used: int, seed: int) -> np.ndarray:
    whole = np.zeros((1, length, width), np.float32)
    whole[:, :used] = normal(1, used, width, seed=seed)
    return whole


def golden(numbers: tuple[int, ...] = (1, 4, 11), used: tuple[int, int] = (3, 1)) -> Golden:
    branches = ("conditional", "unconditional")
    return Golden(
        run={"prompt": 'ein "roter" Kreis,\n红色', "seed": "7"},
        constants={"rope_cos": normal(5, 6), "vace_scale": np.array([0.5, 2], np.float32)},
        contexts={name: context(9, 4, used[i], seed=i) for i, name in enumerate(branches)},
        steps=tuple(
            GoldenStep(
                step=number,
                tokens=normal(1, 5, 8, seed=number),
                timestep=np.array([999 - number], np.float32),
                velocities={name: normal(1, 5, 4, seed=number + len(name)) for name in branches},
            )
            for number in numbers
        ),
    )


def require_equal(a: Golden, b: Golden) -> None:
    assert a.run == b.run
    assert [step.step for step in a.steps] == [step.step for step in b.steps]
    pairs = [(a.constants, b.constants), (a.contexts, b.contexts)]
    for mine, theirs in zip(a.steps, b.steps, strict=True):
        pairs.append((mine.velocities, theirs.velocities))
        pairs.append(({"tokens": mine.tokens}, {"tokens": theirs.tokens}))
        pairs.append(({"timestep": mine.timestep}, {"timestep": theirs.timestep}))
    for left, right in pairs:
        assert [*left] == [*right]
        for name, value in left.items():
            assert value.dtype == right[name].dtype == np.float32
            assert value.shape == right[name].shape
            assert np.array_equal(value.view(np.uint32), right[name].view(np.uint32))


@pytest.mark.parametrize("used", [(3, 1), (9, 9), (1, 5)])
@pytest.mark.parametrize("numbers", [(1,), (1, 4, 11), (2, 10, 100)])
def test_it_comes_back_as_it_was(
    numbers: tuple[int, ...], used: tuple[int, int], tmp_path: Path
) -> None:
    original = golden(numbers, used)
    write_golden(original, tmp_path / "dit.safetensors")
    require_equal(read_golden(tmp_path / "dit.safetensors"), original)


def test_views_and_signed_zeros_come_back(tmp_path: Path) -> None:
    """Rows that are used may hold zeros, and arrays may be slices of others."""
    original = golden()
    text = original.contexts["conditional"]
    text[0, 1] = 0
    text[0, 2] = [0, -0.0, 5e-45, 0]
    original.constants["rope_cos"] = normal(6, 5).T
    write_golden(original, tmp_path / "dit.safetensors")
    require_equal(read_golden(tmp_path / "dit.safetensors"), original)


def test_rows_of_zeros_are_not_stored(tmp_path: Path) -> None:
    original = golden(used=(3, 1))
    original.contexts["unconditional"][:] = 0
    write_golden(original, tmp_path / "dit.safetensors")
    stored = load_file(tmp_path / "dit.safetensors")
    assert stored["context.conditional"].shape == (1, 3, 4)
    assert stored["context.unconditional"].shape == (1, 1, 4)
    require_equal(read_golden(tmp_path / "dit.safetensors"), original)


def test_the_same_steps_give_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        write_golden(golden(), tmp_path / name)
    write_golden(read_golden(tmp_path / "a"), tmp_path / "c")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()
    write_golden(golden((1, 4, 12)), tmp_path / "d")
    assert (tmp_path / "a").read_bytes() != (tmp_path / "d").read_bytes()


def test_others_may_read_it(tmp_path: Path) -> None:
    write_golden(golden(), tmp_path / "dit.safetensors")
    assert (tmp_path / "dit.safetensors").stat().st_mode & 0o044 == 0o044


def test_every_sample_has_every_input() -> None:
    original = golden()
    samples = list(original.samples())
    assert [(step.step, branch) for step, branch, _ in samples] == [
        (number, branch) for number in (1, 4, 11) for branch in ("conditional", "unconditional")
    ]
    for step, branch, feeds in samples:
        assert set(feeds) == {"rope_cos", "vace_scale", "context", "tokens", "timestep"}
        assert feeds["context"] is original.contexts[branch]
        assert feeds["tokens"] is step.tokens


def refused(path: Path) -> str:
    with pytest.raises(CorruptInputError) as caught:
        read_golden(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.isprintable()
    assert len(message) < 600
    assert str(path) in message
    return message


def test_a_missing_file(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "none")


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_a_file_that_is_cut(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "dit.safetensors"
    write_golden(golden(), path)
    path.write_bytes(path.read_bytes()[:keep])
    refused(path)


@pytest.mark.parametrize(
    "data",
    [b"no safetensors at all", b"\xff" * 64, (2).to_bytes(8, "little") + b"{}", b"\0" * 1000],
)
def test_a_file_of_something_else(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "dit").write_bytes(data)
    refused(tmp_path / "dit")


def without(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(name)


def put(name: str, value: Any) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.__setitem__(name, np.asarray(value))


def only(*kinds: str) -> Callable[[Tensors], Any]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.split(".")[0] not in kinds]:
            del tensors[name]

    return change


SHAPE = "context_shape.conditional"
HUGE = 1 << 40
DAMAGES: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "no tokens": (without("step.4.tokens"), "step.4.tokens"),
    "no timestep": (without("step.4.timestep"), "step.4.timestep"),
    "no velocity": (without("step.4.velocity.conditional"), "velocity"),
    "no shape of text": (without(SHAPE), SHAPE),
    "no steps": (only("constant", "context", "context_shape"), "no steps"),
    "no text": (only("constant", "step"), "no steps"),
    "nothing": (only("constant"), "no steps"),
    "no number": (put("step.x.tokens", normal(2)), "invalid literal"),
    "empty number": (put("step.", normal(2)), "invalid literal"),
    "long number": (put("step." + "9" * 5000 + ".tokens", normal(2)), "integer string conversion"),
    "line break": (put("con\ntext", np.zeros(3)), "is F64"),
    "long text": (put(SHAPE, [1, HUGE, 4]), "do not fit"),
    "much text": (put(SHAPE, [1, (1 << 26) // 4 + 1, 4]), "do not fit"),
    "short text": (put(SHAPE, [1, 2, 4]), "do not fit"),
    "negative text": (put(SHAPE, [1, -9, 4]), "do not fit"),
    "wide text": (put(SHAPE, [1, 9, 5]), "do not fit"),
    "batch of text": (put(SHAPE, [2, 9, 4]), "do not fit"),
    "no length": (put(SHAPE, [1, 9]), "do not fit"),
    "scalar shape": (put(SHAPE, 9), "do not fit"),
    "nested shape": (put(SHAPE, [[1, 9, 4]]), "do not fit"),
    "empty shape": (put(SHAPE, np.zeros(0, np.int64)), "do not fit"),
    "broken shape": (put(SHAPE, [1, np.inf, 4]), "is F64"),
    "flat text": (put("context.conditional", normal(4)), "do not fit"),
    "scalar text": (put("context.conditional", np.float32(1)), "do not fit"),
    "no rows of text": (put("context.conditional", np.zeros((1, 0, 4), np.float32)), "do not fit"),
    "no columns": (put("context.conditional", np.zeros((1, 3, 0), np.float32)), "do not fit"),
    "two texts": (put("context.conditional", normal(2, 3, 4)), "do not fit"),
    "whole numbers": (put("step.4.tokens", np.zeros((1, 5, 8), np.int32)), "is I32"),
    "doubles": (put("step.4.velocity.conditional", np.zeros((1, 5, 4))), "is F64"),
    "halves": (put("constant.rope_cos", np.zeros((5, 6), np.float16)), "is F16"),
    "scalar timestep": (put("step.4.timestep", np.float32(3)), "timestep of shape ()"),
    "empty timestep": (put("step.4.timestep", np.zeros(0, np.float32)), "timestep of shape (0,)"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_tensors_that_cannot_be(damage: str, tmp_path: Path) -> None:
    change, words = DAMAGES[damage]
    path = tmp_path / "dit.safetensors"
    write_golden(golden(), path)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"run": RUN})
    assert words in refused(path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.complex64])
def test_types_that_numpy_lacks(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "dit.safetensors"
    write_golden(golden(), path)
    tensors = {name: torch.from_numpy(value) for name, value in load_file(path).items()}
    tensors["step.4.tokens"] = tensors["step.4.tokens"].to(dtype)
    save_torch(tensors, path, metadata={"run": RUN})
    refused(path)


@pytest.mark.parametrize(
    "run",
    [
        None, "", "prompt", "[1]", "null", '{"prompt": NaN}', '{"a": 1, "a": 2}', "[" * 100_000,
        '{"a": "\\ud800"', '{"a": ' + "9" * 10_000 + "}",
    ],
)  # fmt: skip
def test_runs_that_cannot_be(run: str | None, tmp_path: Path) -> None:
    path = tmp_path / "dit.safetensors"
    write_golden(golden(), path)
    with safe_open(path, framework="numpy") as file:
        assert list(file.metadata()) == ["run"]
    save_file(load_file(path), path, metadata=None if run is None else {"run": run})
    refused(path)
