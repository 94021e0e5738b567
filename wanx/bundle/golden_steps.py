"""Golden steps: inputs of the denoiser at a few steps of a real run, and its right outputs.

They travel with the bundle, so that its accuracy can be checked on any machine later. The answers
come from the source weights in PyTorch in fp32, not from the bundle's own graphs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from wanx.bundle.record import printable
from wanx.errors import CorruptInputError
from wanx.files.input_file import parse_json_object

GOLDEN = "golden/dit.safetensors"
_MAX_TEXT = 1 << 26  # numbers of one text feature; Wan2.1 has 512 x 4096

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class GoldenStep:
    """One step of a run.

    Attributes:
        step: its number, from 1.
        tokens: ``[1, L, token_dim]`` float32.
        timestep: ``[1]`` float32.
        velocities: per guidance branch ``[1, L, velocity_dim]`` float32.
    """

    step: int
    tokens: Array
    timestep: Array
    velocities: dict[str, Array]


@dataclass(frozen=True, kw_only=True)
class Golden:
    """A few steps of one run.

    Attributes:
        run: prompt, seed, size and the other options of the run, as text.
        constants: graph inputs that stay the same, such as ``rope_cos``.
        contexts: text features per guidance branch ``[1, text_len, text_dim]`` float32.
        steps: in the order of the run.
    """

    run: dict[str, str]
    constants: dict[str, Array]
    contexts: dict[str, Array]
    steps: tuple[GoldenStep, ...]

    def samples(self) -> Iterator[tuple[GoldenStep, str, dict[str, Array]]]:
        """Yield each step and branch with all inputs of the denoiser's graph."""
        for step in self.steps:
            for branch in step.velocities:
                yield step, branch, {
                    **self.constants,
                    "context": self.contexts[branch],
                    "tokens": step.tokens,
                    "timestep": step.timestep,
                }  # fmt: skip


def golden_tensors(golden: Golden) -> dict[str, Array]:
    """Name every array of golden steps for a safetensors file.

    The text features end at their last row that is not zero.
    """
    tensors = {f"constant.{name}": value for name, value in golden.constants.items()}
    for branch, context in golden.contexts.items():
        used = np.flatnonzero(context[0].any(axis=1))
        tensors[f"context.{branch}"] = context[:, : int(used[-1]) + 1 if len(used) else 1]
        tensors[f"context_shape.{branch}"] = np.array(context.shape, np.int64)
    for step in golden.steps:
        tensors[f"step.{step.step}.tokens"] = step.tokens
        tensors[f"step.{step.step}.timestep"] = step.timestep
        for branch, velocity in step.velocities.items():
            tensors[f"step.{step.step}.velocity.{branch}"] = velocity
    return {name: np.ascontiguousarray(value) for name, value in tensors.items()}


def golden_from_tensors(tensors: dict[str, Array], run: dict[str, str]) -> Golden:
    """The inverse of :func:`golden_tensors`.

    Raises:
        KeyError, ValueError: the tensors are not of golden steps.
    """
    contexts = {}
    for name, value in tensors.items():
        kind, _, branch = name.partition(".")
        if kind == "context":
            contexts[branch] = _padded_context(value, tensors[f"context_shape.{branch}"].tolist())
    numbers = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("step.")})
    steps = tuple(
        GoldenStep(
            step=number,
            tokens=tensors[f"step.{number}.tokens"],
            timestep=tensors[f"step.{number}.timestep"],
            velocities={branch: tensors[f"step.{number}.velocity.{branch}"] for branch in contexts},
        )
        for number in numbers
    )
    if not contexts or not steps:
        raise ValueError("there are no steps in it")
    for step in steps:
        if step.timestep.shape != (1,):
            raise ValueError(f"step {step.step} has a timestep of shape {step.timestep.shape}")
    constants = {
        name.removeprefix("constant."): value
        for name, value in tensors.items()
        if name.startswith("constant.")
    }
    return Golden(run=run, constants=constants, contexts=contexts, steps=steps)


def _padded_context(used: Array, shape: object) -> Array:
    """Pad text features with the rows of zeros that were left out."""
    match used.shape, shape:
        case (1, rows, columns), [1, int(length), int(width)] if (
            0 < rows <= length and 0 < columns == width and length * width <= _MAX_TEXT
        ):
            whole = np.zeros((1, length, width), np.float32)
            whole[:, :rows] = used
            return whole
    raise ValueError(f"text features {used.shape} do not fit into {shape}")


def write_golden(golden: Golden, path: Path) -> None:
    """Write golden steps to a safetensors file; the same steps give the same bytes."""
    # Not save_file, which makes a file that nobody else can read.
    path.write_bytes(save(golden_tensors(golden), metadata={"run": json.dumps(golden.run)}))


def read_golden(path: Path) -> Golden:
    """Read the golden steps of a bundle, whose manifest vouches for the file.

    Raises:
        CorruptInputError: the file is not one of golden steps.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: _read_tensor(file, name) for name in file.keys()}  # noqa: SIM118
            run = parse_json_object((file.metadata() or {})["run"].encode(), path)
        return golden_from_tensors(tensors, {key: str(value) for key, value in run.items()})
    except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
        raise CorruptInputError(
            f"{path} holds no golden steps ({printable(error)[:240]}); export the bundle again"
        ) from None


def _read_tensor(file: Any, name: str) -> Array:
    """A tensor of golden steps; numpy lacks some of the types that a file can have."""
    expected = "I64" if name.startswith("context_shape.") else "F32"
    stored = file.get_slice(name).get_dtype()
    if stored != expected:
        raise ValueError(f"{name} is {stored} instead of {expected}")
    return cast(Array, file.get_tensor(name))
